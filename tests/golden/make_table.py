"""Writes tests/golden/table-v5: the cache of make_cache.py, as if its two shards were very many. Run by
`make golden`.
"""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from storage import manifest
from tests.golden import make_cache

GOLDEN = Path(__file__).parent / "table-v5"


def write(out: Path) -> None:
    """The golden cache, in `out`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "MOST_LISTED", 1)
        make_cache.write(out)


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
