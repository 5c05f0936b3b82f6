"""The files of a cache: in its own directory, or as local copies of remote files.

Both give a local directory whose files were compared with the manifest before anything reads them.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from storage.checksums import check_files
from storage.errors import CacheError
from storage.local_copies import LocalCopies
from storage.manifest import FileEntry

if TYPE_CHECKING:
    from storage.remote import Objects


class Files(Protocol):
    """The checked files of one cache."""

    def holding(self, files: Sequence[FileEntry]) -> contextlib.AbstractContextManager[Path]:
        """The directory that their paths are relative to. They are sound, and stay while the context lasts.
        Raises ShardMissing, ShardTruncated or ShardCorrupt; for remote files also StoreUnreachable.
        """


class LocalFiles:
    """Files of a cache in a local directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checked: set[str] = set()  # paths

    @contextlib.contextmanager
    def holding(self, files: Sequence[FileEntry]) -> Iterator[Path]:
        """The cache's own directory; each file is read once to be checked."""
        new = [file for file in files if file.path not in self._checked]
        check_files(self._root, new)
        self._checked.update(file.path for file in new)
        yield self._root


class RemoteFiles:
    """Files of a cache at a URL, as local copies.

    A file is checked when it is fetched, and an older copy when this process first uses it; a damaged copy is
    fetched again.
    """

    def __init__(self, objects: "Objects", copies: LocalCopies) -> None:
        self._objects, self._copies = objects, copies
        self._checked: set[str] = set()  # paths

    @contextlib.contextmanager
    def holding(self, files: Sequence[FileEntry]) -> Iterator[Path]:
        """A directory of copies that no process removes while the context lasts."""
        with contextlib.ExitStack() as held:
            root = held.enter_context(self._copies.holding(files, self._fetch))
            try:
                check_files(root, [file for file in files if file.path not in self._checked])
            except CacheError:
                self._copies.drop(files)
                held.close()
                root = held.enter_context(self._copies.holding(files, self._fetch))
            self._checked.update(file.path for file in files)
            yield root

    def _fetch(self, file: FileEntry, root: Path) -> None:
        self._objects.fetch(file, root)
        self._checked.add(file.path)
