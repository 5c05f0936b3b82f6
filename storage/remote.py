"""Objects below a URL, through fsspec. No other file imports it.

Objects are read and written whole, by name. Nothing is listed, because a listing may lag behind. Endpoints
and credentials are configured for fsspec and the service (environment variables, configuration files); no
secret passes through this code.

The library of a service retries (s3fs: five times, over some seconds); what fails after that is
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

AGAIN = "Upload the cache again; if it was replaced on purpose, open it again."


class Objects:
    """The objects below a URL. Raises ConfigError where no installed library reads URLs of this kind."""

    def __init__(self, url: Url) -> None:
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url.text)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url} cannot be used: {error}.\n"
                "Install a library for such URLs: 'stillroom[s3]' for s3://, gcsfs for gs://, adlfs for abfs://."
            ) from error

    def read(self, path: str, max_bytes: int) -> bytes:
        """A small object. Raises FileNotFoundError, ShardTruncated for more than `max_bytes`,
        StoreUnreachable.
        """
        with tempfile.TemporaryDirectory() as aside:
            self._get(path, Path(aside) / "object", _Watch(self.url / path, max_bytes))
            return (Path(aside) / "object").read_bytes()

    def fetch(self, file: FileEntry, root: Path) -> None:
        """Copy one file of a cache below the local directory `root`, and check it there.

        Raises ShardMissing, ShardTruncated, ShardCorrupt or StoreUnreachable. Of an object that is too large,
        little more than the entry's bytes are written.
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
        """Write one object whole: bytes, or a local file. With `once`: bytes, and only if there is no object
        yet.

        Returns whether the object now has this content. Raises StoreUnreachable.
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
        except Exception as error:  # each service's library has its own errors, with no class in common
            missing = isinstance(error, FileNotFoundError) and done == "read"
            if missing or (isinstance(error, OSError) and error.errno in DISK_FULL):
                raise
            raise StoreUnreachable(
                f"{self.url / path} could not be {done}: {type(error).__name__}: {error}\n"
                "Check that the service runs, the bucket exists and you have access to it (for s3:// see "
                "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
            ) from error


class _Watch(Callback):  # type: ignore[misc]  # fsspec has no types
    """Ends a transfer of more bytes than allowed."""

    def __init__(self, where: Url, most: int) -> None:
        super().__init__()
        self._where, self._most = where, most

    def set_size(self, size: int | None) -> None:
        """Called by most file systems before the first byte."""
        self._check(size or 0)

    def relative_update(self, inc: int = 1) -> None:
        """Called for each part."""
        self.value += inc
        self._check(self.value)

    def _check(self, size: int) -> None:
        if size > self._most:
            raise ShardTruncated(
                f"{self._where} has {size:,} bytes or more; at most {self._most:,} were expected.\n{AGAIN}"
            )
