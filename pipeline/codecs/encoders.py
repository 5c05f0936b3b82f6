"""The encoders: top-k, random sampling, threshold sampling. docs/codecs.md explains how to choose one.

Shape letters: P positions, V vocabulary, B blocks, K ids of a block, M draws of all positions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.codecs.exponentials import BLOCK, F64, BlockSums, FoundIds
from pipeline.data import counter_rng
from pipeline.data.counter_rng import I64, Keys
from storage.codecs import Sample, SparseCodec, SparseSpec, Threshold, TopK
from storage.entries import Entries, ends, ranges

# A head entry is above 0.75 tau (r / m of its tail, with m = round(r / tau) >= 2), so this bound misses none.
CANDIDATE = 0.6
# Tail entries are this much shorter than the step of the walk, so that rounding never selects one twice.
MARGIN = 1e-5
SYSTEMATIC, ROUNDING = 0, 1  # streams of random numbers


def rounding_noise(codec: SparseCodec, entries: Entries, keys: Keys) -> F64 | None:
    """The random numbers that `codec.pack` rounds exact entries with; None for a codec that needs none."""
    if codec.noise_seed is None:
        return None
    counts = entries.num_exact.astype(np.int64)
    most = int(counts.max(initial=0))
    noise = counter_rng.uniforms(codec.noise_seed, keys.rows, keys.positions, most, ROUNDING)
    return noise[np.arange(most) < counts[:, None]]


def top_entries(blocks: BlockSums, codec: TopK, keys: Keys) -> Entries:
    """The k largest probabilities of each position, and the mass of the rest. Draws no random number."""
    num, k = len(blocks), min(codec.k, blocks.num_blocks * BLOCK)
    if k < blocks.num_blocks:  # the k largest block maxima bound the k-th largest id from below
        largest = blocks.largest()
        bounds: F64 = largest.topk(k).values[:, -1].double().cpu().numpy()
        may_hold = largest.double().cpu().numpy() >= bounds[:, None]
    else:
        bounds, may_hold = np.zeros(num), np.ones((num, blocks.num_blocks), bool)
    found = blocks.above(bounds, may_hold)
    has = np.bincount(found.positions, minlength=num)
    counts = np.minimum(has, k)
    chosen = ranges(ends(has)[:-1], counts)
    real = chosen[found.values[chosen] > 0]  # not padding of the last block, nor below float32
    positions, ids, values = found.positions[real], found.ids[real], found.values[real]
    counts = np.bincount(positions, minlength=num)
    blocks.remove(positions, ids)
    left = blocks.sums.sum(1)
    kept = np.bincount(positions, values, minlength=num)
    with np.errstate(divide="ignore"):
        log_tail = np.log(left / (kept + left))
    weights = values / (kept + left)[positions]
    return _entries(counts, ids, weights, counts, log_tail)


def sampled_entries(blocks: BlockSums, codec: Sample, keys: Keys) -> Entries:
    """Counted draws with replacement."""
    num = len(blocks)
    points = counter_rng.uniforms(codec.seed, keys.rows, keys.positions, codec.draws) * blocks.mass[:, None]
    ids = blocks.land(np.full(num, codec.draws), points.reshape(-1))
    owners = np.repeat(np.arange(num), codec.draws)
    both, times = np.unique(owners * (blocks.num_blocks * BLOCK) + ids, return_counts=True)
    positions, ids = np.divmod(both, blocks.num_blocks * BLOCK)
    counts = np.bincount(positions, minlength=num)
    return _entries(counts, ids, times / codec.draws, np.zeros(num, np.int64), np.full(num, -np.inf))


def threshold_entries(blocks: BlockSums, codec: Threshold, keys: Keys) -> Entries:
    """Large probabilities exactly; the tail by systematic sampling."""
    num = len(blocks)
    bounds = CANDIDATE * codec.tau * blocks.mass
    found = blocks.above(bounds, blocks.sums >= bounds[:, None])
    num_head, steps = _heads(found, blocks.mass, codec.tau)
    starts = np.searchsorted(found.positions, np.arange(num))
    chosen = ranges(starts, num_head)
    head_ids, head = found.ids[chosen], found.values[chosen]
    owners = np.repeat(np.arange(num), num_head)
    blocks.remove(owners, head_ids)
    left = np.cumsum(blocks.sums, axis=1)[:, -1]
    mass = np.bincount(owners, head, minlength=num) + left
    steps[left <= 0] = 0
    start = counter_rng.uniforms(codec.seed, keys.rows, keys.positions, 1, SYSTEMATIC)[:, 0]
    walkers = np.repeat(np.arange(num), steps)
    turn = ranges(np.zeros(num, np.int64), steps)
    stride = left / np.maximum(steps, 1)
    tail_ids = blocks.land(steps, (start[walkers] + turn) * stride[walkers])
    counts = num_head + steps
    offsets = ends(counts)
    ids, weights = np.empty(offsets[-1], np.int64), np.empty(offsets[-1])
    at_head, at_tail = ranges(offsets[:-1], num_head), ranges(offsets[:-1] + num_head, steps)
    ids[at_head], weights[at_head] = head_ids, head / mass[owners]
    ids[at_tail], weights[at_tail] = tail_ids, (stride / mass)[walkers]
    return _entries(counts, ids, weights, num_head, np.full(num, -np.inf))


ENCODERS: Mapping[type[SparseSpec], Callable[[BlockSums, Any, Keys], Entries]] = {
    TopK: top_entries,
    Sample: sampled_entries,
    Threshold: threshold_entries,
}


def _heads(found: FoundIds, mass: F64, tau: float) -> tuple[I64, I64]:
    """(ids kept exactly, ids to sample) of each position.

    The smallest head h with t_(h+1) <= r / m, where r is the mass behind the head and m = max(1, round(r /
    tau)): then no id of the tail is longer than a step of the walk, and none is selected twice.
    """
    num = len(mass)
    has = np.bincount(found.positions, minlength=num)
    most = int(has.max(initial=0))
    large_PH = np.zeros((num, most + 1))  # probabilities, largest first, then zeros
    large_PH[:, :most][np.arange(most) < has[:, None]] = found.values / mass[found.positions]
    rest_PH = 1 - np.concatenate([np.zeros((num, 1)), np.cumsum(large_PH[:, :-1], axis=1)], axis=1)
    steps_PH = np.maximum(1, np.rint(rest_PH / tau))
    enough = (steps_PH == 1) | (large_PH <= (1 - MARGIN) * rest_PH / steps_PH)
    head = enough.argmax(1)  # the last column is always enough: no large id is left
    return head, steps_PH[np.arange(num), head].astype(np.int64)


def _entries(counts: I64, ids: I64, weights: F64, num_exact: I64, log_tail: F64) -> Entries:
    return Entries(
        ends(counts), ids.astype(np.int32), weights.astype(np.float32),
        num_exact.astype(np.int32), log_tail.astype(np.float32),
    )  # fmt: skip
