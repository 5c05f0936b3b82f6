"""The cache stage: which shards are missing -> the teacher -> storage. replay.py asks it again, for verify.

Plan: finished shards of the same identity whose rows are all wanted are taken as they are, largest first; the
rows that they leave over are cut, in dataset order, into new shards. So a killed capture goes on where it
was, appended rows cost themselves alone, and two caches of one teacher share what they have in common. The
teacher is loaded when the first missing shard is computed, and not at all where none is.
Where `workers` says so, the missing shards are computed by other processes (cluster.py), with the same bytes.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.capture.fitted_tables import RANKED_TARGETS, fit_bases
from pipeline.capture.identity import capture_identity
from pipeline.capture.plan import Indices, cut_into_shards, key_bytes, plan_reuse, unfinished_shards
from pipeline.capture.shards import answer_and_write, key_of_rows
from pipeline.capture.teacher_weights import find_tensors, write_tensors
from pipeline.config.caches import CacheEntry, Weights
from pipeline.config.params import Workers
from pipeline.data.rows import load_rows
from pipeline.data.tokenizer import TOKENIZER_FILES
from pipeline.engines.engine import EngineInputs, engine_inputs
from pipeline.engines.registry import engine_for
from pipeline.runtime import hardware
from pipeline.runtime.progress import bar, log
from pipeline.teachers.record import teacher_reader, teacher_record
from storage import compact, hidden
from storage.errors import ConfigError, TeacherError
from storage.fingerprints import content_fingerprint, sha256_json
from storage.manifest import Manifest
from storage.seal import CarriedWeights, SealedParts, seal
from storage.spec import Identity
from storage.writer import Store, StoredShard

INLINE = Workers()


class Captured(NamedTuple):
    """What a capture did."""

    manifest: Manifest
    computed_rows: int  # rows that the teacher was run on now
    seconds: float  # what the teacher needed for all shards, now or earlier (hardware.compute_seconds)
    cut_rows: int  # rows that lost tokens to the teacher's maximum


def capture_cache(
    name: str,
    entry: CacheEntry,
    dataset: Path,
    teacher: Path,
    out: Path,
    store: Store,
    before_teacher: Callable[[], None] = lambda: None,
    workers: Workers = INLINE,
) -> Captured:
    """Ask the teacher about every row that no finished shard holds, and seal the cache into `out`.

    `before_teacher` is called before the teacher is loaded for the first time; it may refuse by raising.
    `workers` says where it is asked, and decides no byte.
    """
    rows = load_rows(dataset)
    first = who = capture_identity(entry, teacher)
    _refuse_other_labels(name, who.spec.labels, rows.label_names)
    carried = _carried(name, entry.weights, teacher)
    threads = workers.threads or hardware.num_cores()
    hardware.pin_threads(threads)  # also where nothing is missing: provenance tells it
    reader = teacher_reader(teacher)
    asked = engine_inputs(teacher, who.spec, reader, rows, before_teacher)
    teaching = engine_for(asked)
    store.lock_shared()
    store.sweep()
    row_ids = rows.row_ids.to_pylist()
    ranks = basis = pinned = None
    bases: dict[str, hidden.Basis] = {}
    if who.spec.ranked:
        ranks = store.ranks(who)
        if ranks is None:
            ranks = store.keep_ranks(who, compact.rank_by(teaching.probability_mass(RANKED_TARGETS)))
        pinned = sha256_json(ranks.tolist())
    if who.spec.hidden is not None and who.spec.hidden.pca is not None:
        basis = store.basis(who) or store.keep_basis(who, fit_bases(who.spec.hidden, asked, teaching))
        bases = hidden.read_bases(basis, who.spec.hidden)
    who = capture_identity(entry, teacher, pinned, hidden.fingerprint(bases) if bases else None)
    cut = cut_into_shards(who, rows.row_ids, asked.inputs.hashes(), entry.shard_rows)
    store.fetch(who, cut.names())
    finished = store.finished(who)
    left = unfinished_shards(cut, key_bytes(shard.entry.key for shard in finished))
    if left is None:  # shards of other rows, or cut otherwise
        taken, missing = plan_reuse(row_ids, finished, entry.shard_rows)
    else:
        taken, missing = finished, [cut.part(shard) for shard in left]
    total, todo = len(set(row_ids)), sum(len(part) for part in missing)
    log(f"{name}: {total - todo:,} of {total:,} rows are captured already, in {len(taken)} shards")
    if missing and workers.capture == "inline":
        with bar(f"capturing {name}", todo, "rows") as advance:

            def still_missing() -> Iterator[Indices]:
                for part in missing:
                    held = store.shard(who, key_of_rows(asked, who, part))
                    if held is None:
                        yield part
                    else:  # another capture has finished it by now
                        taken.append(held)
                        advance(len(part))

            taken += answer_and_write(teaching, still_missing(), store, who, ranks, advance, bases)
    elif missing:
        asked.before_loading()
        taken += _spread(name, entry, dataset, asked, missing, store, first, who, workers, threads)
        store.sweep()  # what killed workers left
        store.fetch(who, ())  # workers write here alone; a store at a URL is offered it now
        taken = [store.shard(who, shard.entry.key) or shard for shard in taken]
    place = {row: index for index, row in reversed(list(enumerate(row_ids)))}
    taken.sort(key=lambda shard: place[shard.row_ids()[0].as_py()])
    files = {file: (teacher / file).read_bytes() for file in TOKENIZER_FILES if (teacher / file).is_file()}
    table = None if ranks is None else ranks.tolist()
    sealed = seal(out, SealedParts(who, taken, files, _provenance(entry, teacher), table, carried, basis))
    return Captured(sealed, todo, sum(shard.seconds for shard in taken), asked.inputs.num_cut)


def capture_summary(name: str, entry: CacheEntry, captured: Captured, teacher: Path) -> dict[str, Any]:
    """What the capture cost and made, for the report: rows, tokens, bytes, seconds."""
    files = [file for shard in captured.manifest.every_shard for file in shard.files]
    logit_bytes = sum(file.bytes for file in files if file.path.startswith("logits/"))
    training = teacher_record(teacher)["training"]
    return {
        "cache": name,
        "teacher": entry.teacher,
        "rows": captured.manifest.num_rows,
        "positions": sum(shard.positions for shard in captured.manifest.every_shard),
        "shards": len(captured.manifest.every_shard),
        "bytes": sum(file.bytes for file in files),
        "logit_bytes": logit_bytes,
        "hidden_bytes": sum(file.bytes for file in files) - logit_bytes,
        "seconds": captured.seconds,
        "teacher_train_seconds": training["seconds"] if training else None,
        "truncated_rows": captured.cut_rows,
        "precision": captured.manifest.identity.spec.precision,
        "machine": hardware.machine(),
    }


def _spread(
    name: str,
    entry: CacheEntry,
    dataset: Path,
    asked: EngineInputs,
    missing: Sequence[Indices],
    store: Store,
    first: Identity,
    who: Identity,
    workers: Workers,
    threads: int,
) -> list[StoredShard]:
    """Have the missing shards computed by other processes. Dask is imported here and not before."""
    from pipeline.capture.worker import CaptureJob, planned_shards

    try:
        from pipeline.capture.dask_cluster import compute_on_cluster
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"workers.capture: {workers.capture} needs Dask, and {error.name} is not installed.\n"
            "Write inline, or install it: pip install --constraint constraints.txt --editable '.[cluster]'"
        ) from None
    job = CaptureJob(
        entry=entry.model_copy(update={"precision": who.spec.precision}),
        dataset=dataset.resolve(),
        rows=content_fingerprint(asked.row_ids.to_pylist()),
        teacher=asked.teacher.resolve(),
        store=store.root.resolve(),
        first=first,
        who=who,
        threads=threads,
    )
    return compute_on_cluster(name, job, planned_shards(asked, who, missing), workers)


def _refuse_other_labels(name: str, teacher: tuple[str, ...], dataset: tuple[str, ...]) -> None:
    """Before the teacher is run: verify would refuse the cache afterwards."""
    if teacher != dataset:
        raise TeacherError(
            f"caches.{name}: the teacher's outputs are not the dataset's labels, in its order.\n"
            f"  teacher {list(teacher)}\n  dataset {list(dataset)}\n"
            "Write the dataset's labels in the teacher's order, or fine-tune the teacher on this dataset."
        )


def _carried(name: str, entry: Weights | None, teacher: Path) -> CarriedWeights | None:
    """What the cache is to carry, looked for before the teacher is run."""
    if entry is None:
        return None
    found = find_tensors(name, teacher, entry.layers)
    return CarriedWeights(entry.layers, partial(write_tensors, found, teacher))


def _provenance(entry: CacheEntry, teacher: Path) -> dict[str, Any]:
    """For people: versions, machine, how good the teacher is. No time of day: bytes must not hold one."""
    made = teacher_record(teacher)
    packages = ("torch", "transformers", "tokenizers", "pyarrow", "zarr", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": hardware.machine(),
        "threads": torch.get_num_threads(),
        "teacher": entry.teacher,
        **{f"teacher_{key}": made[key] for key in ("accuracy", "quality") if key in made},
        "dataset": entry.dataset,
    }
