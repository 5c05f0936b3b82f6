"""Digests of files: `file_entry` computes them, `check_files` compares them."""

import hashlib
from collections.abc import Iterable, Set
from pathlib import Path

from storage.errors import ShardCorrupt, ShardMissing, ShardTruncated, ShardUnexpected
from storage.manifest import FileEntry

AGAIN = "Fetch it again (`dvc checkout --force`, `dvc pull`), or rebuild it: sound shards are reused."


def file_entry(root: Path, relative: str) -> FileEntry:
    """The entry of one file as it is on disk now."""
    path = root / relative
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path=relative, bytes=path.stat().st_size, sha256=digest)


def check_sizes(root: Path, files: Iterable[FileEntry]) -> None:
    """Raise ShardMissing or ShardTruncated where a file is missing or has another size than was sealed."""
    for file in files:
        path = root / file.path
        if not path.is_file():
            raise ShardMissing(
                f"{path} is missing: the manifest lists it with {file.bytes:,} bytes.\n{AGAIN}"
            )
        size = path.stat().st_size
        if size != file.bytes:
            raise ShardTruncated(f"{path} has {size:,} bytes; {file.bytes:,} were sealed.\n{AGAIN}")


def check_files(root: Path, files: Iterable[FileEntry]) -> None:
    """Raise ShardMissing, ShardTruncated or ShardCorrupt where a file is not what was sealed."""
    for file in files:
        check_sizes(root, [file])
        found = file_entry(root, file.path)
        if found.sha256 != file.sha256:
            raise ShardCorrupt(
                f"{root / file.path} is damaged.\n"
                f"  sha256 found    {found.sha256}\n  sha256 expected {file.sha256}\n{AGAIN}"
            )


def check_no_stray(root: Path, listed: Set[str], below: str = "") -> None:
    """Raise ShardUnexpected where a file below `root / below` is not in `listed` (relative to `root`)."""
    present = {p.relative_to(root).as_posix() for p in (root / below).rglob("*") if not p.is_dir()}
    if stray := sorted(present - listed):
        raise ShardUnexpected(f"{root / stray[0]} is not part of this cache ({len(stray)} such): remove it.")


def file_entries(root: Path, below: str = "") -> tuple[FileEntry, ...]:
    """The entries of all files below `root / below`, relative to `root`."""
    files = sorted(path for path in (root / below).rglob("*") if path.is_file())
    return tuple(file_entry(root, path.relative_to(root).as_posix()) for path in files)
