"""Whole objects below a URL, through fsspec: the one file that knows it (storage/ opens local paths itself).

Objects are read and written whole, by name; nothing is ever listed, because a listing may lag behind. Where
a bucket is, and who may read it, is fsspec's own business: its environment variables and configuration files,
and those of the service. Nothing here knows a secret.

A file system retries as its own library does (s3fs: five times, over some seconds); what then still fails is
StoreUnreachable.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.callbacks import Callback

from storage.checksums import file_entry
from storage.disk import DISK_FULL
from storage.errors import (
    ConfigError,
    ShardCorrupt,
    ShardMissing,
    ShardTruncated,
    StillroomError,
    StoreUnreachable,
)
from storage.location import Url
from storage.manifest import FileEntry

AGAIN = "Upload the cache again; or, where it was replaced on purpose, open it again."


class Objects:
    """The objects below a URL. Raises ConfigError where no installed library reads such URLs."""

    def __init__(self, url: Url) -> None:
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url.text)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url} cannot be used: {error}.\n"
                "Install what reads such URLs: 'stillroom[s3]' for s3://, gcsfs for gs://, adlfs for abfs://."
            ) from error

    def read(self, path: str, max_bytes: int) -> bytes:
        """A small object. Raises FileNotFoundError where there is none, ShardTruncated where it has more than
        `max_bytes`, and StoreUnreachable.
        """
        with tempfile.TemporaryDirectory() as aside:
            self._get(path, Path(aside) / "object", _Watch(self.url / path, max_bytes))
            return (Path(aside) / "object").read_bytes()

    def fetch(self, file: FileEntry, root: Path) -> None:
        """Copy one file of a cache below the local directory `root`, and check it there.

        Raises ShardMissing, ShardTruncated, ShardCorrupt or StoreUnreachable. Of an object that is too large
        little more than the entry's bytes is written.
        """
        target, where = root / file.path, self.url / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._get(file.path, target, _Watch(where, file.bytes))
        except FileNotFoundError:
            raise ShardMissing(
                f"{where} is missing: the manifest lists it with {file.bytes:,} bytes.\n{AGAIN}"
            ) from None
        found = file_entry(root, file.path)
        if found.bytes != file.bytes:
            raise ShardTruncated(f"{where} has {found.bytes:,} bytes; {file.bytes:,} were sealed.\n{AGAIN}")
        if found.sha256 != file.sha256:
            raise ShardCorrupt(
                f"{where} is not the object that was sealed.\n"
                f"  sha256 found    {found.sha256}\n  sha256 expected {file.sha256}\n{AGAIN}"
            )

    def write(self, path: str, content: bytes | Path, once: bool = False) -> bool:
        """Write one object whole: bytes, or a local file. With `once` bytes, and only where there is none.

        Returns whether the object is now what was to be written. Raises StoreUnreachable.
        """
        with self._explained("written", path):
            try:
                if isinstance(content, Path):
                    self._fs.put_file(str(content), self._at(path))
                else:
                    self._fs.pipe_file(self._at(path), content, mode="create" if once else "overwrite")
            except FileExistsError:
                return self.read(path, len(content)) == content if isinstance(content, bytes) else False
        return True

    def _get(self, path: str, target: Path, watch: "_Watch") -> None:
        with self._explained("read", path):
            self._fs.get_file(self._at(path), str(target), callback=watch)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    @contextlib.contextmanager
    def _explained(self, done: str, path: str) -> Iterator[None]:
        try:
            yield
        except StillroomError:
            raise
        except Exception as error:  # each service's library has errors of its own, with no class in common
            missing = isinstance(error, FileNotFoundError) and done == "read"
            if missing or (isinstance(error, OSError) and error.errno in DISK_FULL):
                raise
            raise StoreUnreachable(
                f"{self.url / path} could not be {done}: {type(error).__name__}: {error}\n"
                "Look whether the service runs, the bucket is there, and you may use it (for s3:// see "
                "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
            ) from error


class _Watch(Callback):  # type: ignore[misc]  # fsspec has no types
    """Ends a transfer of more bytes than there may be."""

    def __init__(self, where: Url, most: int) -> None:
        super().__init__()
        self._where, self._most = where, most

    def set_size(self, size: int | None) -> None:
        """Told by most file systems before the first byte comes."""
        self._refuse(size or 0)

    def relative_update(self, inc: int = 1) -> None:
        """Told of each part."""
        self.value += inc
        self._refuse(self.value)

    def _refuse(self, size: int) -> None:
        if size > self._most:
            raise ShardTruncated(
                f"{self._where} has {size:,} bytes or more; at most {self._most:,} were expected.\n{AGAIN}"
            )
