"""A disk that ends while something is written."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from storage.errors import StoreFull

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def disk_full_explained(where: Path) -> Iterator[None]:
    """Turn the system's errors of a full disk into StoreFull, which names `where` was written."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreFull) or error.errno not in DISK_FULL:
            raise
        raise StoreFull(
            f"no space left while writing below {where}: {os.strerror(error.errno or 0)}.\n"
            "Finished shards are kept. Free some space and run the same command again: it goes on from there."
        ) from error
