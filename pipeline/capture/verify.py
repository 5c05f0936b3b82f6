"""The verify stage: is a cache whole, does it fit, and does its teacher still say what it holds?"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.capture.identity import capture_identity, with_tables
from pipeline.capture.teacher_weights import check_weights
from pipeline.config.caches import CacheEntry
from pipeline.data.rows import Rows, load_rows
from pipeline.engines.engine import engine_inputs
from pipeline.engines.registry import engine_for
from pipeline.runtime import hardware
from pipeline.runtime.progress import bar
from pipeline.streaming.hidden_states import concatenate_states, read_states
from pipeline.teachers.record import teacher_reader
from storage import Cache
from storage.entries import Entries, concatenate, ends
from storage.errors import Mismatch, SpecMismatch
from storage.records import EntryRows, LogitRows
from storage.verify import verify

REPLAY_ROWS, REPLAY_TOKENS = 256, 8192  # at most so many rows, and no more once there are so many tokens
# How far a replayed logit may lie from the cached one, relative to the largest of its target: rounding of
# other batch shapes and processors in float32; two units in the last place of bfloat16 through a dozen
# layers.
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2}
# How far the square root of a replayed probability may lie from that of a cached entry, beyond the same
# rounding: a step of the compact layout.
ENTRY_STEP = 0.03
# How far a number of a hidden state lies from what it was made of, relative to the largest of its vector.
STATE_STEP = {"float32": 0.0, "float16": 2**-11, "int8": 0.5 / 127}
# The least share of entries that a replay must give again.
SAME_ENTRIES = {"float32": 0.98, "bfloat16": 0.6}


def verify_cache(name: str, cache: Cache, entry: CacheEntry, dataset: Path, teacher: Path) -> dict[str, Any]:
    """Verify everything that can be: fit, coverage, every byte, and a replay. Returns a deterministic record.

    Raises SpecMismatch or another CacheError that names the first fault.
    """
    rows = load_rows(dataset)
    codec = cache.identity.spec.sparse
    ranks = None if codec is None else codec.ranks  # any table of frequent ids is good
    basis = None if cache.identity.spec.hidden is None else cache.identity.spec.hidden.basis  # and any basis
    expected = with_tables(capture_identity(entry, teacher), ranks, basis)
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
    check_weights(name, cache, entry.weights, teacher)
    with bar(f"verifying {name}", cache.num_rows, "rows") as advance:
        counts = verify(cache, advance)
    replayed = replay(cache, rows, teacher)
    return {"cache": name, "manifest": cache.manifest_sha256, **counts._asdict(), "replayed_rows": replayed}


def replay(cache: Cache, rows: Rows, teacher: Path) -> int:
    """Ask the teacher again about a sample of rows that the cache's content chooses; return how many.

    Raises SpecMismatch where a row's tokens, logits or hidden states are not those that were cached, within
    the codec's error.
    """
    cached = [cache.read(shard) for shard in cache.shards]
    place = {row: index for index, row in enumerate(rows.row_ids.to_pylist())}
    ids = pa.concat_arrays([part.row_ids for part in cached]).to_pylist()
    hashes = pa.concat_arrays([part.input_hashes for part in cached]).to_pylist()
    lengths = np.concatenate([part.num_tokens for part in cached])
    generator = np.random.PCG64(np.random.SeedSequence(int(cache.manifest_sha256, 16)))
    order = np.argsort(generator.random_raw(len(ids)), kind="stable")[:REPLAY_ROWS]
    enough = int(np.searchsorted(np.cumsum(lengths[order]), REPLAY_TOKENS)) + 1
    chosen = np.sort(order[:enough])
    reader = teacher_reader(teacher)
    names = [ids[i] for i in chosen]
    spec = cache.identity.spec
    sample = rows.take(np.array([place[name] for name in names]))
    asked = engine_inputs(teacher, spec, reader, sample)
    faults = [
        Mismatch(f"row {ids[i]}: {'token ids' if rows.pixels is None else 'pixels'}", hashes[i], found)
        for i, found in zip(chosen, asked.inputs.hashes().to_pylist(), strict=True)
        if hashes[i] != found
    ]
    hardware.pin_threads(hardware.num_cores())
    if not faults:
        answer = engine_for(asked).answer(np.arange(len(chosen)))
        said = answer.kept
        held = _rows(cached, chosen)
        if isinstance(said, LogitRows) and isinstance(held, LogitRows):
            faults += _other_logits(held, said, TOLERANCE[spec.precision])
        elif isinstance(said, EntryRows) and isinstance(held, EntryRows):
            faults += _other_entries(held, said, spec.num_outputs, spec.precision)
        faults += _other_states(cache, cached, chosen, answer.hidden)
    if faults:
        advice = "Other weights or other code made it. Rebuild it; raise CAPTURE_VERSION where code changed."
        raise SpecMismatch(f"{cache.path} is not what its teacher says today", faults[:10], advice)
    return len(chosen)


def _rows(parts: Sequence[LogitRows | EntryRows], chosen: npt.NDArray[np.int64]) -> LogitRows | EntryRows:
    """These rows of all parts laid end to end, in ascending order."""
    taken: list[Any] = [part.take(own) for part, own in zip(parts, _own_rows(parts, chosen), strict=True)]
    columns = [
        concatenate(list(column)) if isinstance(column[0], Entries)
        else None if column[0] is None
        else pa.concat_arrays(column) if isinstance(column[0], pa.Array)
        else np.concatenate(column)
        for column in zip(*taken, strict=True)
    ]  # fmt: skip
    made: LogitRows | EntryRows = type(taken[0])(*columns)
    return made


def _own_rows(
    parts: Sequence[LogitRows | EntryRows], chosen: npt.NDArray[np.int64]
) -> list[npt.NDArray[np.int64]]:
    """Which of its own rows each part has among these rows of all parts laid end to end."""
    first = ends([len(part.row_ids) for part in parts])
    return [chosen[(chosen >= start) & (chosen < stop)] - start for start, stop in pairwise(first)]


def _other_states(
    cache: Cache,
    parts: Sequence[LogitRows | EntryRows],
    chosen: npt.NDArray[np.int64],
    said: Mapping[str, npt.NDArray[np.float32]],
) -> list[Mismatch]:
    """Hidden states of the chosen rows that the teacher does not have again."""
    spec = cache.identity.spec
    if spec.hidden is None:
        return []
    held = concatenate_states(
        [
            read_states(cache, shard, cache.hidden_names, own, part.num_tokens)
            for shard, (part, own) in enumerate(zip(parts, _own_rows(parts, chosen), strict=True))
        ]
    )
    ids = pa.concat_arrays([part.row_ids for part in parts]).take(pa.array(chosen))
    tolerance, faults = TOLERANCE[spec.precision] + STATE_STEP[spec.hidden.dtype], []
    for name, cached in held.items():
        again, scale = said[name], np.abs(said[name]).max(axis=1)
        if name in spec.hidden.component_names:
            again = cache.hidden_basis(name).components(again)
            scale = np.maximum(scale, np.abs(again).max(axis=1))
        apart = np.abs(again - cached.values).max(axis=1)
        rows = np.arange(len(chosen))
        owners = rows if cached.num_tokens is None else np.repeat(rows, cached.num_tokens)
        for i in np.flatnonzero(~(apart <= tolerance * scale))[:1]:
            at = int(np.abs(again - cached.values)[i].argmax())
            faults.append(
                Mismatch(
                    f"row {ids[int(owners[i])]}: {name}[{at}]",
                    float(cached.values[i, at]),
                    float(again[i, at]),
                )
            )
    return faults


def _other_logits(held: LogitRows, again: LogitRows, tolerance: float) -> list[Mismatch]:
    cached, said = held.logits, again.logits
    scale = np.maximum(np.abs(said).max(axis=1), 1.0)
    error = np.abs(said - cached).max(axis=1) / scale
    wrong = np.flatnonzero(~(error <= tolerance))
    rows = held.row_ids.take(pa.array(held.owners[wrong]))
    return [
        Mismatch(f"row {row}: logits", cached[i].tolist(), said[i].tolist())
        for row, i in zip(rows, wrong, strict=True)
    ]


def _other_entries(held: EntryRows, said: EntryRows, num_outputs: int, precision: str) -> list[Mismatch]:
    """Entries that the teacher does not give again, with the same random numbers.

    An entry may be missing now and then: where rounding moves a probability past the edge of the head, or a
    draw past the edge of two ids. An exact one that is there must have the same weight.
    """
    cached, again = held.entries, said.entries
    if (cached.positions.max(initial=0)) >= len(again.counts):
        return [Mismatch("positions", len(cached.counts), len(again.counts))]
    owners = np.repeat(np.arange(len(held.row_ids)), held.num_positions)
    if len(other := np.flatnonzero((cached.counts > 0) != (again.counts > 0))):
        row = held.row_ids[int(owners[other[0]])]
        return [Mismatch(f"row {row}: positions with a target", "others", "those of its task and mask")]
    before = cached.positions * num_outputs + cached.ids
    now = again.positions * num_outputs + again.ids
    order = np.argsort(now)
    at = order[np.minimum(np.searchsorted(now, before, sorter=order), max(len(now) - 1, 0))]
    there = now[at] == before
    faults = []
    if there.mean() < SAME_ENTRIES[precision]:
        faults.append(Mismatch("entries given again", "all", f"{there.mean():.1%} of them"))
    exact = np.arange(len(before)) < np.repeat(cached.offsets[:-1] + cached.num_exact, cached.counts)
    apart = np.abs(np.sqrt(cached.weights) - np.sqrt(again.weights[at])) > ENTRY_STEP + TOLERANCE[precision]
    exact_again = at < (again.offsets[:-1] + again.num_exact)[again.positions[at]]
    for entry in np.flatnonzero(there & exact & exact_again & apart):
        what = f"row {held.row_ids[int(owners[cached.positions[entry]])]}: id {cached.ids[entry]}"
        faults.append(Mismatch(what, float(cached.weights[entry]), float(again.weights[at[entry]])))
    return faults
