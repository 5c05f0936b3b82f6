"""The identity of a cache: its teacher, tokenizer and spec, read from files alone."""

import json
from pathlib import Path
from typing import Any

from pipeline.config.caches import CacheEntry, Hidden, mask_spec
from pipeline.config.tasks import TASKS
from pipeline.engines.model_files import teacher_identity
from pipeline.runtime import hardware
from pipeline.teachers.record import reading_spec, teacher_reader, teacher_record
from storage.errors import TeacherError
from storage.fingerprints import Sha256
from storage.spec import EmbeddingSpec, HiddenSpec, Identity, ImageSpec, Spec
from storage.tasks import Task

CAPTURE_VERSION = int((Path(__file__).parents[1] / "CAPTURE_VERSION").read_text())

LAYERS_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
WIDTH_KEYS = ("hidden_size", "dim", "n_embd", "d_model")


def capture_identity(entry: CacheEntry, teacher: Path) -> Identity:
    """The teacher, tokenizer and spec of a cache, without fitted tables. Reads files, loads no model."""
    record = teacher_record(teacher)
    reader, reading = teacher_reader(teacher), reading_spec(teacher)
    spec = Spec(
        task=record["task"],
        labels=tuple(record["labels"]),
        vocab_size=record.get("vocab_size"),
        codec=entry.targets.spec(None),
        max_length=reader.max_length,
        too_long=record["too_long"],
        precision=hardware.precision(entry.precision),
        hidden=_hidden_spec(entry.hidden, record["task"], teacher),
        mask=mask_spec(record["task"], entry.mask),
        image=reading if isinstance(reading, ImageSpec) else None,
        embedding=reading if isinstance(reading, EmbeddingSpec) else None,
    )
    return Identity(
        capture_version=CAPTURE_VERSION,
        teacher=teacher_identity(teacher),
        tokenizer=reader.identity(),
        spec=spec,
    )


def with_tables(bare: Identity, ranks: Sha256 | None, basis: Sha256 | None) -> Identity:
    """The identity of a cache whose spec names these fitted tables, by their fingerprints.

    `ranks` belongs to a compact layout, `basis` to hidden states as principal components; where the spec has
    no use for one, it is left out.
    """
    spec, changes = bare.spec, dict[str, Any]()
    if spec.sparse is not None and spec.ranked:
        changes["codec"] = spec.sparse.model_copy(update={"ranks": ranks})
    if spec.hidden is not None and spec.hidden.pca is not None:
        changes["hidden"] = spec.hidden.model_copy(update={"basis": basis})
    return bare.model_copy(update={"spec": spec.model_copy(update=changes)})


def _hidden_spec(entry: Hidden | None, task: Task, teacher: Path) -> HiddenSpec | None:
    if entry is None:
        return None
    if TASKS[task].inputs == "images":
        raise TeacherError(f"hidden: the states of {task} cannot be kept; remove it.")
    if TASKS[task].stored.per_position and entry.pool != "none":
        raise TeacherError(
            f"hidden.pool: {task} has one target a token, and hidden states are kept one a target.\n"
            f"Write pool: none, not {entry.pool}."
        )
    model = json.loads((teacher / "config.json").read_text())
    layers = next((model[key] for key in LAYERS_KEYS if model.get(key)), None)
    width = next((model[key] for key in WIDTH_KEYS if model.get(key)), None)
    if layers is None or width is None:
        raise TeacherError(
            f"hidden: {teacher}/config.json does not have the number of layers, or their width.\n"
            f"Expected one of {LAYERS_KEYS} and one of {WIDTH_KEYS}. Leave `hidden` out to keep logits alone."
        )
    if wrong := [layer for layer in entry.layers if layer > layers]:
        raise TeacherError(
            f"hidden.layers: the teacher in {teacher} has layers 0 (embeddings) to {layers}, not {wrong}.\n"
            "Name some of these."
        )
    if wrong := [block for block in entry.qkv if block > layers]:
        raise TeacherError(
            f"hidden.qkv: the teacher in {teacher} has attention blocks 1 to {layers}, not {wrong}.\n"
            "Name some of these."
        )
    if entry.pca is not None and entry.pca > width:
        raise TeacherError(
            f"hidden.pca: states of the teacher in {teacher} have {width} numbers, fewer than {entry.pca}.\n"
            "Keep at most as many components."
        )
    return HiddenSpec(
        layers=entry.layers, pool=entry.pool, width=width, dtype=entry.dtype, qkv=entry.qkv, pca=entry.pca,
    )  # fmt: skip
