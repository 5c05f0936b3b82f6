"""One shard as a task for a worker: what it is told, and what it does. Knows no Dask.

A worker is told where things lie and which rows are meant, and tells what it did: no tensors travel. It reads
dataset and teacher itself, keeps them for the next shard of the same capture, and refuses where they are not
those that the driver saw. Whether a shard is there already, whoever wrote it, is asked of the store.
"""

import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from pipeline.capture.identity import capture_identity
from pipeline.capture.shards import answer_and_write, key_of_rows
from pipeline.config.caches import CacheEntry
from pipeline.data.rows import load_rows
from pipeline.engines.engine import EngineInputs, TeacherEngine, engine_inputs
from pipeline.engines.registry import engine_for
from pipeline.runtime import hardware
from pipeline.teachers.record import teacher_reader
from storage import hidden
from storage.errors import Mismatch, SpecMismatch
from storage.fingerprints import Sha256, content_fingerprint, sha256_json
from storage.spec import Identity
from storage.writer import Store

Indices = npt.NDArray[np.int64]


class CaptureJob(NamedTuple):
    """What all shards of a capture have in common: small, for it travels with each. Paths are absolute."""

    entry: CacheEntry  # with the precision that the driver decided on
    dataset: Path
    rows: Sha256  # fingerprint of the dataset's rows
    teacher: Path
    store: Path
    first: Identity  # what tables that were fitted to the teacher are kept under
    who: Identity
    threads: int


class PlannedShard(NamedTuple):
    """A shard that is to be computed."""

    key: str  # its name in the store
    rows: Indices
    positions: int
    called: str  # for people


class ShardResult(TypedDict):
    """What a worker tells."""

    key: str
    computed: bool  # or found in the store


def planned_shards(asked: EngineInputs, who: Identity, parts: Sequence[Indices]) -> list[PlannedShard]:
    """What each part of these rows will be called."""
    found = []
    for part in parts:
        key = key_of_rows(asked, who, part)
        first, last = (asked.row_ids[int(part[place])].as_py() for place in (0, -1))
        called = f"shard {key[:12]} ({len(part):,} rows, {first} to {last})"
        found.append(PlannedShard(key, part, int(asked.inputs.lengths[part].sum()), called))
    return found


def compute_shard(job: CaptureJob, key: str, rows: Indices) -> ShardResult:
    """Compute one shard and write it into the store, if it is not there. One at a time in a process.

    Raises SpecMismatch where this machine sees other rows or another teacher than the driver; errors say
    which machine it was.
    """
    global _state
    with _one_at_a_time:
        try:
            if Store(job.store).shard(job.who, key) is not None:
                return ShardResult(key=key, computed=False)
            hardware.pin_threads(job.threads)  # of this thread: a task may run in any
            if _state is None or _state.job != job:
                _state = None  # its teacher goes before another one comes
                _state = WorkerState(job)
            _state.compute(key, rows)
        except Exception as error:
            error.add_note(f"It happened on {socket.gethostname()}.")
            raise
        return ShardResult(key=key, computed=True)


class WorkerState:
    """What a worker keeps from shard to shard: the rows, the teacher, what was fitted to it."""

    def __init__(self, job: CaptureJob) -> None:
        self.job, store = job, Store(job.store)
        self._rows, self._reader = load_rows(job.dataset), teacher_reader(job.teacher)
        self._teaching: TeacherEngine | None = None
        self._ranks, pinned = None, None
        if job.who.spec.ranked:
            self._ranks = store.ranks(job.first)
            pinned = None if self._ranks is None else sha256_json(self._ranks.tolist())
        basis, self._bases = store.basis(job.first), {}
        if basis is not None and job.first.spec.hidden is not None:
            self._bases = hidden.read_bases(basis, job.first.spec.hidden)
        fitted = hidden.fingerprint(self._bases) if self._bases else None
        who = capture_identity(job.entry, job.teacher, pinned, fitted)
        self._refuse_other("identity", who.fingerprint, job.who.fingerprint)
        self._refuse_other("rows", content_fingerprint(self._rows.row_ids.to_pylist()), job.rows)

    def compute(self, key: str, rows: Indices) -> None:
        """Ask the teacher about these rows, and write the shard."""
        asked = engine_inputs(self.job.teacher, self.job.who.spec, self._reader, self._rows.take(rows))
        everything = np.arange(len(rows))
        self._refuse_other("shard", key_of_rows(asked, self.job.who, everything), key)
        self._teaching = self._teaching.for_rows(asked) if self._teaching else engine_for(asked)
        answer_and_write(
            self._teaching, [everything], Store(self.job.store), self.job.who, self._ranks, bases=self._bases
        )

    def _refuse_other(self, field: str, found: str, expected: str) -> None:
        if found != expected:
            raise SpecMismatch(
                f"{socket.gethostname()} does not see what was to be captured",
                [Mismatch(field, found, expected)],
                f"Every worker must read {self.job.dataset}, {self.job.teacher} and {self.job.store} as the "
                "driver does, with the same code: share the directories, and start the workers anew.",
            )


_state: WorkerState | None = None
_one_at_a_time = threading.Lock()
