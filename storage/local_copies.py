"""Local copies of remote files, up to a limit in bytes; the least recently used ones are removed first.

A piece is a set of files that are used together (a shard's Parquet file, its hidden states, a tokenizer),
named by its content, so caches that share a shard share its copy:

    <root>/<sha256 of the piece's paths and digests>-<bytes>/...   complete and checked
    <root>/<...>-<bytes>.part/...                                  being fetched, or removed
    <root>/lock                                                    locked while one of these changes

Any number of processes and threads may use one directory. Readers have a shared lock (flock) on a piece, a
process that fetches has an exclusive one on its part. Locked pieces are not removed, and the kernel drops the
locks of processes that end. Space is reserved before the first byte is fetched, so the limit holds at every
moment.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from storage.disk import disk_full_explained
from storage.errors import ConfigError, StoreFull
from storage.fingerprints import sha256_json
from storage.manifest import FileEntry

PART = ".part"
TRY_SECONDS = 0.05  # between attempts to find room
WAIT_SECONDS = 600.0  # for readers to release pieces

Fetch = Callable[[FileEntry, Path], None]  # writes a checked file below a directory


class LocalCopies:
    """At most `limit_bytes` of copies below `root`; None: no limit."""

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        self.root, self.limit_bytes = root, limit_bytes

    def check_limit(self, what: object, needed: int) -> None:
        """Raise ConfigError where the limit is below `needed`, the bytes in use at the same time."""
        if self.limit_bytes is not None and self.limit_bytes < needed:
            raise ConfigError(
                f"{self.limit_bytes:,} bytes of local disk are too few for {what}: its largest shard and "
                f"what students keep open next to it have {needed:,}.\nRaise the limit."
            )

    @contextlib.contextmanager
    def holding(self, files: Sequence[FileEntry], fetch: Fetch) -> Iterator[Path]:
        """The directory of these files, which are not removed while the context lasts.

        Missing ones are fetched first, once for all processes. Raises what `fetch` raises, and StoreFull
        where there is no room.
        """
        handle = self._acquire(files, fetch)
        try:
            yield self.root / _name(files)
        finally:
            _unlock(handle)

    def drop(self, files: Sequence[FileEntry]) -> None:
        """Remove the copy of these files even if it is locked: its bytes are wrong."""
        with self._lock():
            self._remove(self.root / _name(files))

    def _acquire(self, files: Sequence[FileEntry], fetch: Fetch) -> int:
        """A file descriptor with a shared lock on the complete piece."""
        final = self.root / _name(files)
        part, needed = _part(final), sum(file.bytes for file in files)
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with self._lock():
                if final.is_dir():
                    os.utime(final)
                    return _locked(final, fcntl.LOCK_SH)
                if not _is_locked(part) and self._make_room(needed):
                    shutil.rmtree(part, ignore_errors=True)  # left by a process that ended
                    part.mkdir()
                    handle = _locked(part, fcntl.LOCK_EX)
                    break
            if time.monotonic() > deadline:
                raise StoreFull(
                    f"no room for {needed:,} bytes in {self.root}: its limit is {self.limit_bytes or 0:,}, "
                    f"and all copies have been in use for {WAIT_SECONDS:.0f} seconds.\n"
                    "Raise the limit, or train fewer students at once."
                )
            time.sleep(TRY_SECONDS)
        try:
            with disk_full_explained(self.root):
                for file in files:
                    fetch(file, part)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            _unlock(handle)
            raise
        with self._lock():
            os.rename(part, final)
            fcntl.flock(handle, fcntl.LOCK_SH)
        return handle

    def _make_room(self, needed: int) -> bool:
        """Remove the least recently used copies until there is room; False where locked ones leave none."""
        if self.limit_bytes is None:
            return True
        there = {path: int(path.name.removesuffix(PART).rpartition("-")[2]) for path in self._pieces()}
        free = self.limit_bytes - sum(there.values())
        for path in sorted(there, key=lambda piece: piece.stat().st_mtime_ns):
            if free >= needed:
                break
            if not _is_locked(path):
                self._remove(path)
                free += there[path]
        return free >= needed

    def _pieces(self) -> list[Path]:
        return [path for path in self.root.iterdir() if path.is_dir()]

    def _remove(self, path: Path) -> None:
        """Remove a piece in one step: a process that is killed here leaves a part, never half a piece."""
        if path.is_dir() and path != _part(path):
            shutil.rmtree(_part(path), ignore_errors=True)
            path = path.rename(_part(path))
        shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            _unlock(handle)


def _name(files: Sequence[FileEntry]) -> str:
    return f"{sha256_json([[f.path, f.sha256] for f in files])}-{sum(f.bytes for f in files)}"


def _part(piece: Path) -> Path:
    return piece.with_name(piece.name.removesuffix(PART) + PART)


def _locked(path: Path, how: int) -> int:
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, how)
    return handle


def _unlock(handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a forked process may have a copy of it
    os.close(handle)


def _is_locked(path: Path) -> bool:
    """Whether a process, this one included, has a lock on it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(handle)
