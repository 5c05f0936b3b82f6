"""Replay: the teacher answers a sample of a cache's rows again, and the cache must hold the same numbers.

Shape letters: N rows, P positions, W width.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data.rows import Rows
from pipeline.engines.engine import EngineOutput, engine_inputs
from pipeline.engines.inference import Indices
from pipeline.engines.registry import engine_for
from pipeline.runtime import hardware
from pipeline.streaming.hidden_states import concatenate_states, read_states
from pipeline.teachers.record import teacher_reader
from storage import Cache
from storage.entries import Entries, concatenate, ends
from storage.errors import Mismatch, SpecMismatch
from storage.records import EntryRows, LogitRows

REPLAY_ROWS, REPLAY_TOKENS = 256, 8192  # the sample ends at whichever comes first
# Largest difference of a replayed logit from the cached one, relative to the largest of its target: rounding
# with other batch shapes and processors in float32; two units in the last place of bfloat16 through a dozen
# layers.
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2}
# Largest difference of the square root of a replayed probability from that of a cached entry, on top of the
# same rounding: a step of the compact layout.
ENTRY_STEP = 0.03
# Error of a stored number of a hidden state, relative to the largest of its vector.
STATE_STEP = {"float32": 0.0, "float16": 2**-11, "int8": 0.5 / 127}
# The least share of entries that a replay must give again.
SAME_ENTRIES = {"float32": 0.98, "bfloat16": 0.6}

CachedRows = LogitRows | EntryRows


class _Sample(NamedTuple):
    """Rows of a cache that are replayed."""

    shards: list[CachedRows]  # all shards
    chosen: Indices  # N, of the rows of all shards end to end, ascending
    row_ids: pa.StringArray  # N
    input_hashes: pa.StringArray  # N

    def rows(self) -> CachedRows:
        """The chosen rows of all shards, end to end."""
        taken: list[Any] = [shard.take(own) for shard, own in zip(self.shards, self.own_rows(), strict=True)]
        columns = [
            concatenate(list(column)) if isinstance(column[0], Entries)
            else None if column[0] is None
            else pa.concat_arrays(column) if isinstance(column[0], pa.Array)
            else np.concatenate(column)
            for column in zip(*taken, strict=True)
        ]  # fmt: skip
        made: CachedRows = type(taken[0])(*columns)
        return made

    def own_rows(self) -> list[Indices]:
        """The chosen rows of each shard, counted from its first row."""
        first, chosen = ends([len(shard.row_ids) for shard in self.shards]), self.chosen
        return [chosen[(chosen >= start) & (chosen < stop)] - start for start, stop in pairwise(first)]


def replay(cache: Cache, rows: Rows, teacher: Path) -> int:
    """Have the teacher answer a sample of rows again, which the cache's content chooses; return how many.

    Raises SpecMismatch where a row's inputs, logits or hidden states are not those of the cache, within the
    codec's error.
    """
    sample = _choose(cache)
    place = {row: index for index, row in enumerate(rows.row_ids.to_pylist())}
    own_rows = rows.take(np.array([place[name] for name in sample.row_ids.to_pylist()]))
    inputs = engine_inputs(teacher, cache.identity.spec, teacher_reader(teacher), own_rows)
    hardware.pin_threads(hardware.num_cores())
    faults = _other_inputs(sample, inputs.inputs.hashes(), "token ids" if rows.pixels is None else "pixels")
    if not faults:
        faults = _other_outputs(cache, sample, engine_for(inputs).answer(np.arange(len(sample.chosen))))
    if faults:
        advice = "Other weights or other code made it. Rebuild it; raise CAPTURE_VERSION where code changed."
        raise SpecMismatch(f"{cache.path} is not what its teacher gives today", faults[:10], advice)
    return len(sample.chosen)


def _choose(cache: Cache) -> _Sample:
    """Random rows; the digest of the manifest is the seed."""
    shards: list[CachedRows] = [cache.read(shard) for shard in cache.shards]
    lengths = np.concatenate([shard.num_tokens for shard in shards])
    generator = np.random.PCG64(np.random.SeedSequence(int(cache.manifest_sha256, 16)))
    order = np.argsort(generator.random_raw(len(lengths)), kind="stable")[:REPLAY_ROWS]
    enough = int(np.searchsorted(np.cumsum(lengths[order]), REPLAY_TOKENS)) + 1
    chosen = np.sort(order[:enough])
    row_ids, hashes = (
        pa.concat_arrays([getattr(shard, column) for shard in shards]).take(pa.array(chosen))
        for column in ("row_ids", "input_hashes")
    )
    return _Sample(shards, chosen, row_ids, hashes)


def _other_inputs(sample: _Sample, hashes: pa.StringArray, what: str) -> list[Mismatch]:
    """Rows that the teacher reads otherwise than when they were captured."""
    found = zip(sample.row_ids.to_pylist(), sample.input_hashes.to_pylist(), hashes.to_pylist(), strict=True)
    return [Mismatch(f"row {row}: {what}", cached, now) for row, cached, now in found if cached != now]


def _other_outputs(cache: Cache, sample: _Sample, output: EngineOutput) -> list[Mismatch]:
    """Targets and hidden states that the teacher does not give again."""
    spec, cached, faults = cache.identity.spec, sample.rows(), list[Mismatch]()
    if isinstance(output.kept, LogitRows) and isinstance(cached, LogitRows):
        faults = _other_logits(cached, output.kept, TOLERANCE[spec.precision])
    elif isinstance(output.kept, EntryRows) and isinstance(cached, EntryRows):
        faults = _other_entries(cached, output.kept, spec.num_outputs, spec.precision)
    return faults + _other_states(cache, sample, output.hidden)


def _other_states(
    cache: Cache, sample: _Sample, states: Mapping[str, npt.NDArray[np.float32]]
) -> list[Mismatch]:
    """The first hidden state of each name that the teacher does not give again."""
    spec = cache.identity.spec
    if spec.hidden is None:
        return []
    held = concatenate_states(
        [
            read_states(cache, shard, cache.hidden_names, own, part.num_tokens)
            for shard, (part, own) in enumerate(zip(sample.shards, sample.own_rows(), strict=True))
        ]
    )
    tolerance, faults = TOLERANCE[spec.precision] + STATE_STEP[spec.hidden.dtype], []
    for name, cached in held.items():
        now, scale = states[name], np.abs(states[name]).max(axis=1)
        if name in spec.hidden.component_names:
            now = cache.hidden_basis(name).components(now)
            scale = np.maximum(scale, np.abs(now).max(axis=1))
        difference_NW = np.abs(now - cached.values)
        rows = np.arange(len(sample.chosen))
        owners = rows if cached.num_tokens is None else np.repeat(rows, cached.num_tokens)
        for i in np.flatnonzero(~(difference_NW.max(axis=1) <= tolerance * scale))[:1]:
            at = int(difference_NW[i].argmax())
            what = f"row {sample.row_ids[int(owners[i])]}: {name}[{at}]"
            faults.append(Mismatch(what, float(cached.values[i, at]), float(now[i, at])))
    return faults


def _other_logits(cached: LogitRows, now: LogitRows, tolerance: float) -> list[Mismatch]:
    """Logits that the teacher does not give again."""
    scale = np.maximum(np.abs(now.logits).max(axis=1), 1.0)
    error = np.abs(now.logits - cached.logits).max(axis=1) / scale
    wrong = np.flatnonzero(~(error <= tolerance))
    rows = cached.row_ids.take(pa.array(cached.owners[wrong]))
    return [
        Mismatch(f"row {row}: logits", cached.logits[i].tolist(), now.logits[i].tolist())
        for row, i in zip(rows, wrong, strict=True)
    ]


def _other_entries(cached: EntryRows, now: EntryRows, num_outputs: int, precision: str) -> list[Mismatch]:
    """Entries that the teacher does not give again, with the same random numbers.

    An entry may be missing now and then: where rounding moves a probability past the edge of the head, or a
    draw past the edge of two ids. An exact one that is there must have the same weight.
    """
    held, again = cached.entries, now.entries
    if (held.positions.max(initial=0)) >= len(again.counts):
        return [Mismatch("positions", len(held.counts), len(again.counts))]
    owners = np.repeat(np.arange(len(cached.row_ids)), cached.num_positions)
    if len(other := np.flatnonzero((held.counts > 0) != (again.counts > 0))):
        row = cached.row_ids[int(owners[other[0]])]
        return [Mismatch(f"row {row}: positions with a target", "others", "those of its task and mask")]
    before = held.positions * num_outputs + held.ids
    after = again.positions * num_outputs + again.ids
    order = np.argsort(after)
    at = order[np.minimum(np.searchsorted(after, before, sorter=order), max(len(after) - 1, 0))]
    found = after[at] == before
    faults = []
    if found.mean() < SAME_ENTRIES[precision]:
        faults.append(Mismatch("entries given again", "all", f"{found.mean():.1%} of them"))
    exact = np.arange(len(before)) < np.repeat(held.offsets[:-1] + held.num_exact, held.counts)
    exact_again = at < (again.offsets[:-1] + again.num_exact)[again.positions[at]]
    step = np.abs(np.sqrt(held.weights) - np.sqrt(again.weights[at]))
    wrong = found & exact & exact_again & (step > ENTRY_STEP + TOLERANCE[precision])
    for entry in np.flatnonzero(wrong):
        what = f"row {cached.row_ids[int(owners[held.positions[entry]])]}: id {held.ids[entry]}"
        faults.append(Mismatch(what, float(held.weights[entry]), float(again.weights[at[entry]])))
    return faults
