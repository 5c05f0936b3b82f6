"""The cache stage: which shards are missing -> the teacher -> storage. And its replay, for verify.

Plan: finished shards of the same identity whose rows are all wanted are taken as they are, largest first; the
rows that they leave over are cut, in dataset order, into new shards. So a killed capture goes on where it
was, appended rows cost themselves alone, and two caches of one teacher share what they have in common. The
teacher is loaded when the first missing shard is computed, and not at all where none is.
"""

import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline import config, engine, hardware, teachers
from pipeline.data import Rows, load_rows
from pipeline.progress import bar, log
from pipeline.tokens import FILES, Tokens
from storage import Cache, records
from storage.errors import Mismatch, SpecMismatch, TeacherError
from storage.manifest import Manifest
from storage.spec import HiddenSpec, Identity, Spec
from storage.verify import verify
from storage.writer import Store, StoredShard, seal

STORE = Path(".stillroom")
CAPTURE_VERSION = int((Path(__file__).parent / "CAPTURE_VERSION").read_text())
REPLAY_ROWS = 256
# How far a replayed logit may lie from the cached one, relative to the largest logit of its row: rounding of
# other batch shapes and processors in float32; two units in the last place of bfloat16 through a dozen
# layers.
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2}

LAYERS_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
WIDTH_KEYS = ("hidden_size", "dim", "n_embd", "d_model")

Indices = npt.NDArray[np.int64]


class Captured(NamedTuple):
    """What a capture did."""

    manifest: Manifest
    computed_rows: int  # rows that the teacher was run on now
    seconds: float  # what the teacher needed for all shards, now or earlier (hardware.compute_seconds)
    cut_rows: int  # rows that lost tokens to the teacher's maximum


def identity(entry: config.CacheEntry, teacher: Path) -> Identity:
    """Who will be asked, and what will be kept. Reads the teacher's files, loads no model."""
    record = teachers.record(teacher)
    reader = teachers.reader(teacher)
    spec = Spec(
        task="sequence-classification",
        labels=tuple(record["labels"]),
        codec=entry.targets,
        max_length=reader.max_length,
        too_long=record["too_long"],
        precision=hardware.precision(entry.precision),
        hidden=_hidden_spec(entry.hidden, teacher),
    )
    return Identity(
        capture_version=CAPTURE_VERSION,
        teacher=teachers.identity(teacher),
        tokenizer=reader.identity(),
        spec=spec,
    )


def plan(
    row_ids: Sequence[str], finished: Sequence[StoredShard], shard_rows: int
) -> tuple[list[StoredShard], list[Indices]]:
    """(shards to take as they are, rows of each new shard) so that every distinct row is in exactly one.

    `finished` is largest first; a shard is taken where all its rows are wanted and none is taken already. The
    plan depends on the arguments alone, and finishing any of its new shards leaves the rest of it as it was.
    """
    first: dict[str, int] = {}
    for index, row in enumerate(row_ids):
        first.setdefault(row, index)
    left = set(first)
    taken = []
    for shard in finished:
        held = shard.row_ids().to_pylist()
        if left.issuperset(held):
            left.difference_update(held)
            taken.append(shard)
    rest = np.array([index for row, index in first.items() if row in left], np.int64)
    return taken, [rest[start : start + shard_rows] for start in range(0, len(rest), shard_rows)]


def capture(
    name: str,
    entry: config.CacheEntry,
    dataset: Path,
    teacher: Path,
    out: Path,
    store: Store,
    before_teacher: Callable[[], None] = lambda: None,
) -> Captured:
    """Ask the teacher about every row that no finished shard holds, and seal the cache into `out`.

    `before_teacher` is called when a shard is missing, before the teacher is loaded; it may refuse by
    raising.
    """
    rows = load_rows(dataset)
    who = identity(entry, teacher)
    _refuse_other_labels(name, who.spec.labels, rows.label_names)
    hardware.pin_threads(hardware.num_cores())  # also where nothing is missing: provenance tells it
    reader = teachers.reader(teacher)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    store.sweep()
    row_ids = rows.row_ids.to_pylist()
    taken, missing = plan(row_ids, store.finished(who), entry.shard_rows)
    total, todo = len(set(row_ids)), sum(len(part) for part in missing)
    log(f"{name}: {total - todo:,} of {total:,} rows are captured already, in {len(taken)} shards")
    if missing:
        before_teacher()
        hashes = tokens.hashes()
        model = teachers.load(teacher, pad_token_id=reader.pad_id)
        with bar(f"capturing {name}", todo, "rows") as advance:
            for part in missing:
                started = hardware.compute_seconds()
                said = engine.infer(
                    model, tokens, part, reader.pad_id, who.spec.precision, who.spec.hidden, row_ids, advance
                )
                kept = _logit_rows(rows, hashes, tokens, part, said)
                taken.append(store.put(who, kept, said.hidden, hardware.compute_seconds() - started))
    place = {row: index for index, row in reversed(list(enumerate(row_ids)))}
    taken.sort(key=lambda shard: place[shard.row_ids()[0].as_py()])
    files = {file: (teacher / file).read_bytes() for file in FILES if (teacher / file).is_file()}
    sealed = seal(out, who, taken, files, _provenance(entry, teacher))
    return Captured(sealed, todo, sum(shard.seconds for shard in taken), tokens.num_cut)


def summary(name: str, entry: config.CacheEntry, captured: Captured, teacher: Path) -> dict[str, Any]:
    """What the capture cost and made, for the report: rows, tokens, bytes, seconds."""
    files = [file for shard in captured.manifest.shards for file in shard.files]
    logit_bytes = sum(file.bytes for file in files if file.path.startswith("logits/"))
    training = teachers.record(teacher)["training"]
    return {
        "cache": name,
        "teacher": entry.teacher,
        "rows": captured.manifest.num_rows,
        "positions": sum(shard.positions for shard in captured.manifest.shards),
        "shards": len(captured.manifest.shards),
        "bytes": sum(file.bytes for file in files),
        "logit_bytes": logit_bytes,
        "hidden_bytes": sum(file.bytes for file in files) - logit_bytes,
        "seconds": captured.seconds,
        "teacher_train_seconds": training["seconds"] if training else None,
        "truncated_rows": captured.cut_rows,
        "precision": captured.manifest.identity.spec.precision,
        "machine": hardware.machine(),
    }


def check(name: str, cache: Cache, entry: config.CacheEntry, dataset: Path, teacher: Path) -> dict[str, Any]:
    """Verify everything that can be: fit, coverage, every byte, and a replay. Returns a deterministic record.

    Raises SpecMismatch or another CacheError that names the first fault.
    """
    rows = load_rows(dataset)
    expected = identity(entry, teacher)
    if entry.precision == "auto":  # captured elsewhere, perhaps: its own word for its precision is good
        spec = expected.spec.model_copy(update={"precision": cache.identity.spec.precision})
        expected = expected.model_copy(update={"spec": spec})
    advice = f"Rebuild it with `dvc repro cache@{name}`: shards that still fit are kept."
    cache.check(
        f"caches.{name}",
        identity=expected,
        labels=rows.label_names,
        row_ids=rows.row_ids,
        whole=True,
        advice=advice,
    )
    with bar(f"verifying {name}", cache.num_rows, "rows") as advance:
        counts = verify(cache, advance)
    replayed = replay(cache, rows, teacher)
    return {"cache": name, "manifest": cache.manifest_sha256, **counts._asdict(), "replayed_rows": replayed}


def replay(cache: Cache, rows: Rows, teacher: Path) -> int:
    """Ask the teacher again about a sample of rows that the cache's content chooses; return how many.

    Raises SpecMismatch where a row's tokens or logits are not those that were cached, within the codec's
    error.
    """
    cached = [cache.read(shard) for shard in cache.shards]
    place = {row: index for index, row in enumerate(rows.row_ids.to_pylist())}
    ids = pa.concat_arrays([part.row_ids for part in cached]).to_pylist()
    hashes = pa.concat_arrays([part.input_hashes for part in cached]).to_pylist()
    logits_NC = np.concatenate([part.logits for part in cached])
    generator = np.random.PCG64(np.random.SeedSequence(int(cache.manifest_sha256, 16)))
    chosen = np.sort(np.argsort(generator.random_raw(len(ids)), kind="stable")[:REPLAY_ROWS])
    reader = teachers.reader(teacher)
    texts = [rows.texts[place[ids[i]]].as_py() for i in chosen]
    tokens = reader.read(texts, [ids[i] for i in chosen])
    faults = [
        Mismatch(f"row {ids[i]}: token ids", hashes[i], found)
        for i, found in zip(chosen, tokens.hashes().to_pylist(), strict=True)
        if hashes[i] != found
    ]
    precision = cache.identity.spec.precision
    hardware.pin_threads(hardware.num_cores())
    model = teachers.load(teacher, pad_token_id=reader.pad_id)
    said = engine.infer(model, tokens, np.arange(len(chosen)), reader.pad_id, precision).logits
    if said.shape[1] != len(cache.labels):
        raise TeacherError(
            f"the teacher gives {said.shape[1]} logits a row, the cache has {len(cache.labels)}."
        )
    scale = np.maximum(np.abs(said).max(axis=1), 1.0)
    error = np.abs(said - logits_NC[chosen]).max(axis=1) / scale
    faults += [
        Mismatch(f"row {ids[i]}: logits", logits_NC[i].tolist(), said[n].tolist())
        for n, i in enumerate(chosen)
        if not error[n] <= TOLERANCE[precision]
    ]
    if faults:
        advice = "Other weights or other code made it. Rebuild it; raise CAPTURE_VERSION where code changed."
        raise SpecMismatch(f"{cache.path} is not what its teacher says today", faults[:10], advice)
    return len(chosen)


def _refuse_other_labels(name: str, teacher: tuple[str, ...], dataset: tuple[str, ...]) -> None:
    """Before the teacher is run: verify would refuse the cache afterwards."""
    if teacher != dataset:
        raise TeacherError(
            f"caches.{name}: the teacher's outputs are not the dataset's labels, in its order.\n"
            f"  teacher {list(teacher)}\n  dataset {list(dataset)}\n"
            "Write the dataset's labels in the teacher's order, or fine-tune the teacher on this dataset."
        )


def _hidden_spec(hidden: config.Hidden | None, teacher: Path) -> HiddenSpec | None:
    if hidden is None:
        return None
    model = json.loads((teacher / "config.json").read_text())
    layers = next((model[key] for key in LAYERS_KEYS if model.get(key)), None)
    width = next((model[key] for key in WIDTH_KEYS if model.get(key)), None)
    if layers is None or width is None:
        raise TeacherError(
            f"hidden: {teacher}/config.json does not say how many layers it has, or how wide.\n"
            f"Expected one of {LAYERS_KEYS} and one of {WIDTH_KEYS}. Leave `hidden` out to keep logits alone."
        )
    if wrong := [layer for layer in hidden.layers if layer > layers]:
        raise TeacherError(
            f"hidden.layers: the teacher in {teacher} has layers 0 (embeddings) to {layers}, not {wrong}."
        )
    return HiddenSpec(layers=hidden.layers, pool=hidden.pool, width=width, dtype=hidden.dtype)


def _logit_rows(
    rows: Rows, hashes: pa.StringArray, tokens: Tokens, part: Indices, said: engine.TeacherOutput
) -> records.LogitRows:
    lengths = tokens.lengths[part].astype(np.int32)
    return records.LogitRows(rows.row_ids.take(part), hashes.take(part), lengths, said.logits)


def _provenance(entry: config.CacheEntry, teacher: Path) -> dict[str, Any]:
    """For people: which versions and machine, how good the teacher is. No time of day: bytes must not depend
    on it.
    """
    packages = ("torch", "transformers", "tokenizers", "pyarrow", "zarr", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": hardware.machine(),
        "threads": torch.get_num_threads(),
        "teacher": entry.teacher,
        "teacher_accuracy": teachers.record(teacher)["accuracy"],
        "dataset": entry.dataset,
    }
