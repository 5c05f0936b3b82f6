"""Every error that Stillroom raises on purpose, in one tree.

StillroomError: what a user can fix; the message has what, where, found, expected, and what to do
├── ConfigError      (ValueError)       params.yaml or the command line has an invalid value
├── AssetError       (OSError)          a download or a file is missing, or is not the expected one
├── DataError        (ValueError)       a dataset cannot be used as it is
├── TeacherError     (ValueError)       a teacher cannot be used as it is, or returned a non-finite value
├── TrainingError    (ArithmeticError)  a student's loss became NaN or infinite
├── ExportError      (ValueError)       an exported model differs from its student, or a run has none
├── TeacherElsewhere (RuntimeError)     a teacher would start here whose outputs another machine has
├── StoreFull        (OSError)          the disk ran full; finished shards are kept
├── ShardUnwritten   (OSError)          another error while a shard was written; finished shards are kept
├── StoreInUse       (BlockingIOError)  shards cannot be removed while a capture may take them
├── ShardsFailed     (RuntimeError)     workers gave up on some shards; all others are finished and kept
├── WorkersLost      (ConnectionError)  a scheduler or its workers cannot be reached; finished shards are kept
├── StoreUnreachable (ConnectionError)  a bucket or an object in it could not be read or written
└── CacheError                          a cache that cannot be used
    ├── NoManifest       (FileNotFoundError)  not a cache, or one that was never sealed
    ├── ManifestInvalid  (ValueError)         the manifest is damaged, or was edited
    ├── FormatTooNew     (ValueError)         written by a later Stillroom
    ├── ShardMissing     (FileNotFoundError)  a file that the manifest lists is not there
    ├── ShardTruncated   (OSError)            a file is shorter or longer than the manifest says
    ├── ShardCorrupt     (OSError)            the bytes of a file are not those that were sealed
    ├── ShardUnexpected  (OSError)            a file that the manifest does not list
    └── SpecMismatch     (ValueError)         an intact cache that does not fit; lists each field that differs

Each class is also a builtin error, so `except FileNotFoundError` works without knowing this page.
"""

from collections.abc import Sequence
from typing import NamedTuple


class StillroomError(Exception):
    """Something that a user can fix. `str(error)` is the whole message, ready to print."""


class ConfigError(StillroomError, ValueError):
    """params.yaml or the command line has an invalid value."""


class AssetError(StillroomError, OSError):
    """A download or a file is missing, or is not the expected one."""


class DataError(StillroomError, ValueError):
    """A dataset cannot be used as it is."""


class TeacherError(StillroomError, ValueError):
    """A teacher cannot be used as it is, or returned a non-finite value."""


class TrainingError(StillroomError, ArithmeticError):
    """A student's loss became NaN or infinite."""


class ExportError(StillroomError, ValueError):
    """An exported model differs from its student, or a run has none."""


class TeacherElsewhere(StillroomError, RuntimeError):
    """A teacher would start here whose outputs another machine has."""


class StoreFull(StillroomError, OSError):
    """The disk ran full; finished shards are kept."""


class ShardUnwritten(StillroomError, OSError):
    """Another error while a shard was written; finished shards are kept."""


class StoreInUse(StillroomError, BlockingIOError):
    """Shards cannot be removed while a capture may take them."""


class ShardsFailed(StillroomError, RuntimeError):
    """Workers gave up on some shards; all others are finished and kept."""


class WorkersLost(StillroomError, ConnectionError):
    """A scheduler, or all of its workers, cannot be reached; finished shards are kept."""


class StoreUnreachable(StillroomError, ConnectionError):
    """A bucket or an object in it could not be read or written."""


class CacheError(StillroomError):
    """A cache that cannot be used."""


class NoManifest(CacheError, FileNotFoundError):
    """Not a cache, or one that was never sealed."""


class ManifestInvalid(CacheError, ValueError):
    """The manifest is damaged, or was edited."""


class FormatTooNew(CacheError, ValueError):
    """Written by a later Stillroom."""


class ShardMissing(CacheError, FileNotFoundError):
    """A file that the manifest lists is not there."""


class ShardTruncated(CacheError, OSError):
    """A file is shorter or longer than the manifest says."""


class ShardCorrupt(CacheError, OSError):
    """The bytes of a file are not those that were sealed."""


class ShardUnexpected(CacheError, OSError):
    """A file that the manifest does not list."""


class Mismatch(NamedTuple):
    """One field that differs."""

    field: str
    found: object
    expected: object


class SpecMismatch(CacheError, ValueError):
    """An intact cache that does not fit; `mismatches` has every field that differs."""

    def __init__(self, what: str, mismatches: Sequence[Mismatch], advice: str) -> None:
        self.mismatches = tuple(mismatches)
        fields = "1 field" if len(self.mismatches) == 1 else f"{len(self.mismatches)} fields"
        super().__init__(f"{what} ({fields}).\n{_table(self.mismatches)}\n{advice}")
        self._parts = (what, self.mismatches, advice)

    def __reduce__(self) -> tuple[type["SpecMismatch"], tuple[str, tuple[Mismatch, ...], str]]:
        return type(self), self._parts  # errors are pickled on the way from a worker process


def _table(mismatches: Sequence[Mismatch]) -> str:
    rows = [("", "found", "expected"), *((m.field, _short(m.found), _short(m.expected)) for m in mismatches)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + "   ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _short(value: object) -> str:
    """Short text of a value: digests by their first 12 characters, lists in brackets."""
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return value[:12] + "..."
    if isinstance(value, list | tuple):
        shown = [_short(v) for v in value[:8]] + (["..."] if len(value) > 8 else [])
        return "[" + ", ".join(shown) + "]"
    return str(value)
