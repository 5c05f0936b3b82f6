"""First step of a capture: which shards it reuses, which ones are missing, and what identifies them.

Everything that can be refused is refused here, before the teacher is loaded: labels, capabilities of the
engine, weights to carry, rows that are too long. The teacher is loaded only where a table must be fitted to
it first (fitted_tables.py): the keys of the shards depend on the table.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from pipeline.capture.fitted_tables import FittedTables, fit_tables
from pipeline.capture.identity import capture_identity, with_tables
from pipeline.capture.job import CaptureJob
from pipeline.capture.shard_keys import Indices, cut_into_shards, key_bytes, plan_reuse, unfinished_shards
from pipeline.capture.teacher_weights import find_tensors, write_tensors
from pipeline.config.caches import Weights
from pipeline.data.rows import load_rows
from pipeline.engines.engine import EngineInputs, TeacherEngine, engine_inputs
from pipeline.engines.registry import engine_class, engine_for
from pipeline.runtime import hardware
from pipeline.runtime.progress import log
from pipeline.teachers.record import teacher_reader
from storage.errors import TeacherError
from storage.seal import CarriedWeights
from storage.spec import Identity
from storage.writer import StoredShard


class CapturePlan(NamedTuple):
    """What is left to do, and for which cache."""

    job: CaptureJob
    inputs: EngineInputs  # all rows, as the teacher reads them
    engine: TeacherEngine
    bare_identity: Identity  # without the fingerprints of fitted tables, which are kept under it
    identity: Identity  # of the cache
    tables: FittedTables
    reused: list[StoredShard]
    missing: list[Indices]  # the rows of each shard to compute
    weights: CarriedWeights | None  # of the teacher, for students to start from

    @property
    def num_missing(self) -> int:
        """Rows to compute."""
        return sum(len(part) for part in self.missing)


def plan(job: CaptureJob) -> CapturePlan:
    """What this capture reuses and what it has to compute.

    Raises TeacherError, DataError or another error of the project where the cache cannot be made.
    """
    rows = load_rows(job.dataset)
    bare = capture_identity(job.entry, job.teacher)
    _check_labels(job.name, bare.spec.labels, rows.label_names)
    engine_class(bare.spec)  # refuses what the engine cannot give
    weights = _carried_weights(job.name, job.entry.weights, job.teacher)
    hardware.pin_threads(job.threads)  # also where nothing is missing: the manifest records them
    reader = teacher_reader(job.teacher)
    inputs = engine_inputs(job.teacher, bare.spec, reader, rows, job.before_teacher)
    engine = engine_for(inputs)
    job.store.lock_shared()
    job.store.sweep()
    tables = fit_tables(job.store, bare, inputs, engine)
    identity = with_tables(bare, tables.ranks_fingerprint, tables.basis_fingerprint)
    reused, missing = _missing_shards(job, identity, inputs)
    made = CapturePlan(job, inputs, engine, bare, identity, tables, reused, missing, weights)
    total = len(set(rows.row_ids.to_pylist()))
    done = f"{total - made.num_missing:,} of {total:,}"
    log(f"{job.name}: {done} rows are captured already, in {len(reused)} shards")
    return made


def _missing_shards(
    job: CaptureJob, identity: Identity, inputs: EngineInputs
) -> tuple[list[StoredShard], list[Indices]]:
    """(finished shards to reuse, rows of each shard to compute)."""
    cut = cut_into_shards(identity, inputs.row_ids, inputs.inputs.hashes(), job.entry.shard_rows)
    job.store.fetch(identity, cut.names())
    finished = job.store.finished(identity)
    left = unfinished_shards(cut, key_bytes(shard.entry.key for shard in finished))
    if left is None:  # there are shards of other rows, or of another size
        return plan_reuse(inputs.row_ids.to_pylist(), finished, job.entry.shard_rows)
    return finished, [cut.part(shard) for shard in left]


def _check_labels(name: str, teacher: tuple[str, ...], dataset: tuple[str, ...]) -> None:
    """Raise TeacherError where verify would refuse the cache for its labels."""
    if teacher != dataset:
        raise TeacherError(
            f"caches.{name}: the teacher's outputs are not the dataset's labels, in its order.\n"
            f"  teacher {list(teacher)}\n  dataset {list(dataset)}\n"
            "Write the dataset's labels in the teacher's order, or fine-tune the teacher on this dataset."
        )


def _carried_weights(name: str, entry: Weights | None, teacher: Path) -> CarriedWeights | None:
    """The weights that the cache is to carry. Raises TeacherError where the teacher does not have them."""
    if entry is None:
        return None
    found = find_tensors(name, teacher, entry.layers)
    return CarriedWeights(entry.layers, partial(write_tensors, found, teacher))
