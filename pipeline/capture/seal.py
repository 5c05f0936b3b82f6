"""Last step of a capture: all shards -> the cache, and what it cost."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.plan import CapturePlan
from pipeline.config.caches import CacheEntry
from pipeline.data.tokenizer import TOKENIZER_FILES
from pipeline.runtime import hardware
from pipeline.teachers.record import teacher_record
from storage.seal import SealedParts, seal
from storage.writer import StoredShard


def seal_cache(plan: CapturePlan, shards: Sequence[StoredShard]) -> Captured:
    """Link the shards into the cache, in dataset order, and write its manifest."""
    job, ranks = plan.job, plan.tables.ranks
    place = {row: index for index, row in reversed(list(enumerate(plan.inputs.row_ids.to_pylist())))}
    ordered = sorted(shards, key=lambda shard: place[shard.row_ids()[0].as_py()])
    files = {file: job.teacher / file for file in TOKENIZER_FILES}
    parts = SealedParts(
        identity=plan.identity,
        shards=ordered,
        tokenizer_files={name: path.read_bytes() for name, path in files.items() if path.is_file()},
        provenance=_provenance(job.entry, job.teacher),
        ranks=None if ranks is None else ranks.tolist(),
        weights=plan.weights,
        basis=plan.tables.basis,
    )
    manifest = seal(job.out, parts)
    seconds = sum(shard.seconds for shard in ordered)
    return Captured(manifest, plan.num_missing, seconds, plan.inputs.inputs.num_cut)


def capture_summary(job: CaptureJob, captured: Captured) -> dict[str, Any]:
    """Size and cost of the cache, for the report: rows, tokens, bytes, seconds."""
    shards = captured.manifest.every_shard
    files = [file for shard in shards for file in shard.files]
    logit_bytes = sum(file.bytes for file in files if file.path.startswith("logits/"))
    training = teacher_record(job.teacher)["training"]
    return {
        "cache": job.name,
        "teacher": job.entry.teacher,
        "rows": captured.manifest.num_rows,
        "positions": sum(shard.positions for shard in shards),
        "shards": len(shards),
        "bytes": sum(file.bytes for file in files),
        "logit_bytes": logit_bytes,
        "hidden_bytes": sum(file.bytes for file in files) - logit_bytes,
        "seconds": captured.seconds,
        "teacher_train_seconds": training["seconds"] if training else None,
        "truncated_rows": captured.cut_rows,
        "precision": captured.manifest.identity.spec.precision,
        "machine": hardware.machine(),
    }


def _provenance(entry: CacheEntry, teacher: Path) -> dict[str, Any]:
    """For people: versions, machine, scores of the teacher. No time of day: it would change the bytes."""
    record = teacher_record(teacher)
    packages = ("torch", "transformers", "tokenizers", "pyarrow", "zarr", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": hardware.machine(),
        "threads": torch.get_num_threads(),
        "teacher": entry.teacher,
        **{f"teacher_{key}": record[key] for key in ("accuracy", "quality") if key in record},
        "dataset": entry.dataset,
    }
