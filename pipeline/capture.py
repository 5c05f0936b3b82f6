"""The cache stage: which shards are missing -> the teacher -> storage. replay.py asks it again, for verify.

Plan: finished shards of the same identity whose rows are all wanted are taken as they are, largest first; the
rows that they leave over are cut, in dataset order, into new shards. So a killed capture goes on where it
was, appended rows cost themselves alone, and two caches of one teacher share what they have in common. The
teacher is loaded when the first missing shard is computed, and not at all where none is.
Where `workers` says so, the missing shards are computed by other processes (cluster.py), with the same bytes.
"""

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline import config_teachers, decoders, hardware, planning, states, targets, teachers, weights
from pipeline.asking import Answer, Asker, Questions, asker, questions
from pipeline.config import Workers
from pipeline.data import load_rows
from pipeline.progress import bar, log
from pipeline.tokens import FILES
from storage import compact, hidden
from storage.errors import ConfigError, ShardUnwritten, StoreFull, TeacherError
from storage.manifest import Manifest
from storage.records import EntryRows
from storage.spec import (
    EmbeddingSpec,
    HiddenSpec,
    Identity,
    ImageSpec,
    Sha256,
    Spec,
    content_fingerprint,
    sha256_json,
    shard_key,
)
from storage.writer import Store, StoredShard, Weights, seal

INLINE = Workers()
CAPTURE_VERSION = int((Path(__file__).parent / "CAPTURE_VERSION").read_text())
RANKED_TARGETS = 1024  # whose probabilities say which ids are frequent
BASIS_VECTORS = 8192  # hidden states that principal axes are those of

LAYERS_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
WIDTH_KEYS = ("hidden_size", "dim", "n_embd", "d_model")

Indices = npt.NDArray[np.int64]


class Captured(NamedTuple):
    """What a capture did."""

    manifest: Manifest
    computed_rows: int  # rows that the teacher was run on now
    seconds: float  # what the teacher needed for all shards, now or earlier (hardware.compute_seconds)
    cut_rows: int  # rows that lost tokens to the teacher's maximum


def identity(
    entry: config_teachers.CacheEntry,
    teacher: Path,
    ranks: Sha256 | None = None,
    basis: Sha256 | None = None,
) -> Identity:
    """Who will be asked, and what will be kept. Reads the teacher's files, loads no model.

    `ranks` is the fingerprint of a compact layout's table of frequent ids, `basis` that of the axes of hidden
    states as principal components.
    """
    record = teachers.record(teacher)
    reader, how = teachers.reader(teacher), teachers.how(teacher)
    spec = Spec(
        task=record["task"],
        labels=tuple(record["labels"]),
        vocab_size=record.get("vocab_size"),
        codec=targets.spec(entry.targets, ranks),
        max_length=reader.max_length,
        too_long=record["too_long"],
        precision=hardware.precision(entry.precision),
        hidden=_hidden_spec(entry.hidden, teacher, basis),
        mask=targets.mask(record["task"], entry.mask),
        image=how if isinstance(how, ImageSpec) else None,
        embedding=how if isinstance(how, EmbeddingSpec) else None,
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
    entry: config_teachers.CacheEntry,
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
    first = who = identity(entry, teacher)
    _refuse_other_labels(name, who.spec.labels, rows.label_names)
    carried = _carried(name, entry.weights, teacher)
    threads = workers.threads or hardware.num_cores()
    hardware.pin_threads(threads)  # also where nothing is missing: provenance tells it
    reader = teachers.reader(teacher)
    asked = questions(teacher, who.spec, reader, rows, before_teacher)
    teaching = asker(asked)
    store.hold()
    store.sweep()
    row_ids = rows.row_ids.to_pylist()
    ranks = basis = pinned = None
    bases: dict[str, hidden.Basis] = {}
    if who.spec.codec != "dense" and who.spec.codec.layout == "compact":
        ranks = store.ranks(who)
        if ranks is None:
            ranks = store.keep_ranks(who, compact.rank_by(teaching.mass(RANKED_TARGETS)))
        pinned = sha256_json(ranks.tolist())
    if who.spec.hidden is not None and who.spec.hidden.pca is not None:
        basis = store.basis(who) or store.keep_basis(who, _bases(who.spec.hidden, asked, teaching))
        bases = hidden.read_bases(basis, who.spec.hidden)
    who = identity(entry, teacher, pinned, hidden.fingerprint(bases) if bases else None)
    cut = planning.cut(who, rows.row_ids, asked.inputs.hashes(), entry.shard_rows)
    store.bring(who, cut.names())
    finished = store.finished(who)
    left = planning.unfinished(cut, planning.keys_of(shard.entry.key for shard in finished))
    if left is None:  # shards of other rows, or cut otherwise
        taken, missing = plan(row_ids, finished, entry.shard_rows)
    else:
        taken, missing = finished, [cut.part(shard) for shard in left]
    total, todo = len(set(row_ids)), sum(len(part) for part in missing)
    log(f"{name}: {total - todo:,} of {total:,} rows are captured already, in {len(taken)} shards")
    if missing and workers.capture == "inline":
        with bar(f"capturing {name}", todo, "rows") as advance:

            def still_missing() -> Iterator[Indices]:
                for part in missing:
                    held = store.shard(who, key_of(asked, who, part))
                    if held is None:
                        yield part
                    else:  # another capture has finished it by now
                        taken.append(held)
                        advance(len(part))

            taken += ask_and_write(teaching, still_missing(), store, who, ranks, advance, bases)
    elif missing:
        asked.before_loading()
        taken += _spread(name, entry, dataset, asked, missing, store, first, who, workers, threads)
        store.sweep()  # what killed workers left
        store.bring(who, ())  # workers write here alone; a store at a URL is offered it now
        taken = [store.shard(who, shard.entry.key) or shard for shard in taken]
    place = {row: index for index, row in reversed(list(enumerate(row_ids)))}
    taken.sort(key=lambda shard: place[shard.row_ids()[0].as_py()])
    files = {file: (teacher / file).read_bytes() for file in FILES if (teacher / file).is_file()}
    table = None if ranks is None else ranks.tolist()
    sealed = seal(out, who, taken, files, _provenance(entry, teacher), table, carried, basis)
    return Captured(sealed, todo, sum(shard.seconds for shard in taken), asked.inputs.num_cut)


def summary(
    name: str, entry: config_teachers.CacheEntry, captured: Captured, teacher: Path
) -> dict[str, Any]:
    """What the capture cost and made, for the report: rows, tokens, bytes, seconds."""
    files = [file for shard in captured.manifest.every_shard for file in shard.files]
    logit_bytes = sum(file.bytes for file in files if file.path.startswith("logits/"))
    training = teachers.record(teacher)["training"]
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


def key_of(asked: Questions, who: Identity, part: Indices) -> Sha256:
    """The name of the shard that these rows make."""
    return shard_key(who, asked.row_ids.take(part).to_pylist(), asked.inputs.hashes(part).to_pylist())


def ask_and_write(
    teaching: Asker,
    shards: Iterable[Indices],
    store: Store,
    who: Identity,
    ranks: Indices | None,
    advance: Callable[[int], None] = lambda rows: None,
    bases: Mapping[str, hidden.Basis] | None = None,
) -> list[StoredShard]:
    """Ask the teacher about the rows of each shard, and write it while the next one is asked about.

    One shard at most waits to be written. A writer's error ends the work and names its shard; what was
    written stays. Raises StoreFull or ShardUnwritten.
    """
    written: list[StoredShard] = []
    teaching.load()
    with ThreadPoolExecutor(1) as writer:
        writing: Future[StoredShard] | None = None
        for part in shards:
            started = hardware.compute_seconds()
            said = teaching.ask(part, advance)
            seconds = hardware.compute_seconds() - started
            if writing is not None:
                written.append(writing.result())
            writing = writer.submit(_put, store, who, said, ranks, bases or {}, seconds)
        if writing is not None:
            written.append(writing.result())
    return written


def _spread(
    name: str,
    entry: config_teachers.CacheEntry,
    dataset: Path,
    asked: Questions,
    missing: Sequence[Indices],
    store: Store,
    first: Identity,
    who: Identity,
    workers: Workers,
    threads: int,
) -> list[StoredShard]:
    """Have the missing shards computed by other processes. Dask is imported here and not before."""
    from pipeline import assignment

    try:
        from pipeline import cluster
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"workers.capture: {workers.capture} needs Dask, and {error.name} is not installed.\n"
            "Write inline, or install it: pip install --constraint constraints.txt --editable '.[cluster]'"
        ) from None
    job = assignment.Assignment(
        entry=entry.model_copy(update={"precision": who.spec.precision}),
        dataset=dataset.resolve(),
        rows=content_fingerprint(asked.row_ids.to_pylist()),
        teacher=asked.teacher.resolve(),
        store=store.root.resolve(),
        first=first,
        who=who,
        threads=threads,
    )
    return cluster.spread(name, job, assignment.shards(asked, who, missing), workers)


def _put(
    store: Store,
    who: Identity,
    said: Answer,
    ranks: Indices | None,
    bases: Mapping[str, hidden.Basis],
    seconds: float,
) -> StoredShard:
    """Pack and write one shard. Any error says which one."""
    try:
        packed = None
        if ranks is not None and isinstance(said.kept, EntryRows) and who.spec.codec != "dense":
            order = compact.Ranks(ranks, who.spec.num_outputs)
            packed = compact.pack(who.spec.codec, said.kept.entries, order, said.noise)
        kept = said.hidden | {name: basis.components(said.hidden[name]) for name, basis in bases.items()}
        return store.put(who, said.kept, kept, seconds, packed)
    except Exception as error:
        rows, inputs = said.kept.row_ids.to_pylist(), said.kept.input_hashes.to_pylist()
        key = shard_key(who, rows, inputs)
        shard = f"shard {key[:12]} ({len(rows):,} rows, {rows[0]} to {rows[-1]})"
        if isinstance(error, StoreFull):
            raise StoreFull(f"{error}\nNot written: {shard}.") from error
        raise ShardUnwritten(
            f"{shard} could not be written: {type(error).__name__}: {error}\n"
            "Finished shards are kept. Mend the cause and run the same command again: it goes on from there."
        ) from error


def _refuse_other_labels(name: str, teacher: tuple[str, ...], dataset: tuple[str, ...]) -> None:
    """Before the teacher is run: verify would refuse the cache afterwards."""
    if teacher != dataset:
        raise TeacherError(
            f"caches.{name}: the teacher's outputs are not the dataset's labels, in its order.\n"
            f"  teacher {list(teacher)}\n  dataset {list(dataset)}\n"
            "Write the dataset's labels in the teacher's order, or fine-tune the teacher on this dataset."
        )


def _carried(name: str, entry: decoders.Weights | None, teacher: Path) -> Weights | None:
    """What the cache is to carry, looked for before the teacher is run."""
    if entry is None:
        return None
    found = weights.find(name, teacher, entry.layers)
    return Weights(entry.layers, partial(weights.write, found, teacher))


def _bases(spec: HiddenSpec, asked: Questions, teaching: Asker) -> dict[str, hidden.Basis]:
    """The mean and the principal axes of each layer's states, from the first rows."""
    enough = BASIS_VECTORS
    if spec.pool == "none":
        enough = int(np.searchsorted(asked.tokens.offsets, BASIS_VECTORS))
    first = np.arange(min(enough, len(asked.row_ids)))
    said = teaching.ask(first).hidden
    return {name: states.principal(said[name], spec.kept_width(name)) for name in spec.component_names}


def _hidden_spec(
    entry: config_teachers.Hidden | None, teacher: Path, basis: Sha256 | None
) -> HiddenSpec | None:
    if entry is None:
        return None
    task = teachers.record(teacher)["task"]
    if task != "sequence-classification" and entry.pool != "none":
        raise TeacherError(
            f"hidden.pool: {task} has a target a token, and hidden states are kept like targets; "
            f"write pool: none, not {entry.pool}."
        )
    model = json.loads((teacher / "config.json").read_text())
    layers = next((model[key] for key in LAYERS_KEYS if model.get(key)), None)
    width = next((model[key] for key in WIDTH_KEYS if model.get(key)), None)
    if layers is None or width is None:
        raise TeacherError(
            f"hidden: {teacher}/config.json does not say how many layers it has, or how wide.\n"
            f"Expected one of {LAYERS_KEYS} and one of {WIDTH_KEYS}. Leave `hidden` out to keep logits alone."
        )
    if wrong := [layer for layer in entry.layers if layer > layers]:
        raise TeacherError(
            f"hidden.layers: the teacher in {teacher} has layers 0 (embeddings) to {layers}, not {wrong}."
        )
    if wrong := [block for block in entry.qkv if block > layers]:
        raise TeacherError(
            f"hidden.qkv: the teacher in {teacher} has attention blocks 1 to {layers}, not {wrong}."
        )
    if entry.pca is not None and entry.pca > width:
        raise TeacherError(
            f"hidden.pca: states of the teacher in {teacher} have {width} numbers: no {entry.pca} components."
        )
    return HiddenSpec(
        layers=entry.layers, pool=entry.pool, width=width, dtype=entry.dtype, qkv=entry.qkv, pca=entry.pca,
        basis=basis,
    )  # fmt: skip


def _provenance(entry: config_teachers.CacheEntry, teacher: Path) -> dict[str, Any]:
    """For people: versions, machine, how good the teacher is. No time of day: bytes must not hold one."""
    made = teachers.record(teacher)
    packages = ("torch", "transformers", "tokenizers", "pyarrow", "zarr", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": hardware.machine(),
        "threads": torch.get_num_threads(),
        "teacher": entry.teacher,
        **{f"teacher_{key}": made[key] for key in ("accuracy", "quality") if key in made},
        "dataset": entry.dataset,
    }
