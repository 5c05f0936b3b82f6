"""One capture: the inputs of the cache stage, and its result."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.config.caches import CacheEntry
from pipeline.config.params import Workers
from pipeline.runtime import hardware
from storage.manifest import Manifest
from storage.writer import Store


class CaptureJob(NamedTuple):
    """A cache to make: an entry of params.yaml, and the directories that it is made from and in."""

    name: str  # of the entry, for errors and progress
    entry: CacheEntry
    dataset: Path  # prepared rows
    teacher: Path
    out: Path  # where the cache is sealed
    store: Store  # of finished shards
    before_teacher: Callable[[], None] = lambda: None  # called before the teacher is loaded; may refuse it
    workers: Workers = Workers()  # where shards are computed; no byte depends on it

    @property
    def threads(self) -> int:
        """Threads of each process that computes."""
        return self.workers.threads or hardware.num_cores()


class Captured(NamedTuple):
    """What a capture did."""

    manifest: Manifest
    computed_rows: int  # rows that the teacher answered in this capture
    seconds: float  # that the teacher took for all shards, now or earlier (hardware.compute_seconds)
    cut_rows: int  # rows that were cut at the teacher's maximum length
