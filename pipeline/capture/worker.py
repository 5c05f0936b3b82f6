"""One shard as a task for a worker: what it receives, and what it does. Does not know Dask.

A worker receives paths and the rows of a shard, and returns the shard's key: no tensors travel. It reads the
dataset and loads the teacher itself, keeps them for the next shard of the same capture, and refuses to work
where they are not those that the driver read. A shard that is in the store already is not computed again.
"""

import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from pipeline.capture.fitted_tables import find_tables
from pipeline.capture.identity import capture_identity, with_tables
from pipeline.capture.shards import ShardWriter, answer_and_write, key_of_rows
from pipeline.config.caches import CacheEntry
from pipeline.data.rows import load_rows
from pipeline.engines.engine import EngineInputs, TeacherEngine, engine_inputs
from pipeline.engines.inference import Indices
from pipeline.engines.registry import engine_for
from pipeline.runtime import hardware
from pipeline.teachers.record import teacher_reader
from storage.errors import Mismatch, SpecMismatch
from storage.fingerprints import Sha256, content_fingerprint
from storage.spec import Identity
from storage.writer import Store


class WorkerJob(NamedTuple):
    """What all shards of a capture share. It is small: it travels with each shard. Paths are absolute."""

    entry: CacheEntry  # with the precision that the driver chose
    dataset: Path
    rows: Sha256  # fingerprint of the dataset's rows
    teacher: Path
    store: Path
    bare_identity: Identity  # fitted tables are kept under it
    identity: Identity  # of the cache
    threads: int


class PlannedShard(NamedTuple):
    """A shard to compute."""

    key: str  # its name in the store
    rows: Indices
    positions: int
    label: str  # for messages


class ShardResult(TypedDict):
    """What a worker returns."""

    key: str
    computed: bool  # or found in the store


def planned_shards(inputs: EngineInputs, identity: Identity, parts: Sequence[Indices]) -> list[PlannedShard]:
    """The shards that these parts of the rows make."""
    found = []
    for part in parts:
        key = key_of_rows(inputs, identity, part)
        first, last = (inputs.row_ids[int(part[place])].as_py() for place in (0, -1))
        label = f"shard {key[:12]} ({len(part):,} rows, {first} to {last})"
        found.append(PlannedShard(key, part, int(inputs.inputs.lengths[part].sum()), label))
    return found


def compute_shard(job: WorkerJob, key: str, rows: Indices) -> ShardResult:
    """Compute one shard and write it into the store, unless it is there. One at a time in a process.

    Raises SpecMismatch where this machine reads other rows or another teacher than the driver; errors have a
    note with the name of the machine.
    """
    global _state
    with _one_at_a_time:
        try:
            if Store(job.store).shard(job.identity, key) is not None:
                return ShardResult(key=key, computed=False)
            hardware.pin_threads(job.threads)  # of this thread: a task may run in any
            if _state is None or _state.job != job:
                _state = None  # frees its teacher before another one is loaded
                _state = WorkerState(job)
            _state.compute(key, rows)
        except Exception as error:
            error.add_note(f"It happened on {socket.gethostname()}.")
            raise
        return ShardResult(key=key, computed=True)


class WorkerState:
    """What a worker keeps between shards: the rows, the teacher, the tables that were fitted to it."""

    def __init__(self, job: WorkerJob) -> None:
        self.job, store = job, Store(job.store)
        self._rows, self._reader = load_rows(job.dataset), teacher_reader(job.teacher)
        self._engine: TeacherEngine | None = None
        tables = find_tables(store, job.bare_identity)
        self._writer = ShardWriter(store, job.identity, tables)
        own = capture_identity(job.entry, job.teacher)
        own = with_tables(own, tables.ranks_fingerprint, tables.basis_fingerprint)
        self._check("identity", own.fingerprint, job.identity.fingerprint)
        self._check("rows", content_fingerprint(self._rows.row_ids.to_pylist()), job.rows)

    def compute(self, key: str, rows: Indices) -> None:
        """Answer these rows with the teacher, and write the shard."""
        spec, everything = self.job.identity.spec, np.arange(len(rows))
        inputs = engine_inputs(self.job.teacher, spec, self._reader, self._rows.take(rows))
        self._check("shard", key_of_rows(inputs, self.job.identity, everything), key)
        self._engine = self._engine.for_rows(inputs) if self._engine else engine_for(inputs)
        answer_and_write(self._engine, [everything], self._writer)

    def _check(self, field: str, found: str, expected: str) -> None:
        if found != expected:
            raise SpecMismatch(
                f"{socket.gethostname()} does not see what was to be captured",
                [Mismatch(field, found, expected)],
                f"Every worker must read {self.job.dataset}, {self.job.teacher} and {self.job.store} as the "
                "driver does, with the same code: share the directories, and restart the workers.",
            )


_state: WorkerState | None = None
_one_at_a_time = threading.Lock()
