"""The compact layout: entries -> small integers that compress well, and back.

Ids become ranks (frequent ids first, by a table), are sorted within a position, and only the gaps are kept.
Weights become codes on a grid of arcsines, on which a step costs the same everywhere (the variance-
stabilising transform of a proportion: Anscombe 1948). What follows from the rest is not kept: the weights of
sampled entries, and one degree of freedom of the exact ones. Every array below is a typed Parquet column of
its own; docs/cache-format.md defines each to the bit.

Shape letters: P positions, E entries, R ranked ids.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.codecs import Sample, SparseCodec, Threshold
from storage.entries import Entries, ends, ranges

HEAD_LEVELS = 63  # steps of a head code: the error it adds is a hundredth of the sampling's own variance
TAIL_LEVELS = 65_535
TOPK_LEVELS = 256  # steps of the square root of a probability
MAX_RANKED = 65_536
DENSE_TABLE = 2**22  # vocabularies up to this size are looked up in one array

Columns = dict[str, npt.NDArray[Any]]

_THETA = np.linspace(0.0, np.pi / 2, HEAD_LEVELS + 1)
HEAD_SHARES = np.sin(_THETA) ** 2  # the share of what is left that a code stands for
HEAD_SHARES[-1] = 1.0


class Ranks(NamedTuple):
    """A vocabulary in another order: the ids of `frequent` first, then all others by id."""

    frequent: npt.NDArray[np.int64]  # R, most frequent first
    vocab_size: int

    def rank(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The rank of each id."""
        if self.vocab_size <= DENSE_TABLE:
            ranks = np.empty(self.vocab_size, np.int64)
            ranks[self._table()] = np.arange(self.vocab_size)
            known: npt.NDArray[np.int64] = ranks[ids]
            return known
        order = np.argsort(self.frequent)
        in_order = self.frequent[order]
        below = np.searchsorted(in_order, ids)  # ranked ids that are smaller
        found = in_order[np.minimum(below, len(order) - 1)] == ids if len(order) else np.zeros(len(ids), bool)
        ranks = len(order) + ids.astype(np.int64) - below
        ranks[found] = order[below[found]]
        return ranks

    def id(self, ranks: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """The id of each rank. Raises IndexError for one that no id has."""
        if len(ranks) and not 0 <= int(ranks.min()) <= int(ranks.max()) < self.vocab_size:
            raise IndexError(f"a rank is outside the vocabulary of {self.vocab_size:,}")
        if self.vocab_size <= DENSE_TABLE:
            named: npt.NDArray[np.int32] = self._table()[ranks]
            return named
        in_order = np.sort(self.frequent)
        others = ranks.astype(np.int64) - len(in_order)
        # The k-th id that is not ranked is k + the number of ranked ids that are not above it.
        ids = others + np.searchsorted(in_order - np.arange(len(in_order)), others, side="right")
        ranked = others < 0
        ids[ranked] = self.frequent[ranks[ranked]]
        return ids.astype(np.int32)

    def _table(self) -> npt.NDArray[np.int32]:
        others = np.ones(self.vocab_size, bool)
        others[self.frequent] = False
        return np.concatenate([self.frequent, np.flatnonzero(others)]).astype(np.int32)


def rank_by(mass: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """The ids with the most mass [V], at most MAX_RANKED of them; ties by id."""
    order = np.argsort(-mass, kind="stable")[:MAX_RANKED]
    return order[mass[order] > 0].astype(np.int64)


def pack(
    codec: SparseCodec, entries: Entries, ranks: Ranks, noise: npt.NDArray[np.float64] | None = None
) -> Columns:
    """The columns of the compact layout.

    `noise`, for the threshold codec: a uniform number in [0, 1) for each exact entry in order. It rounds a
    share up or down so that its mean stays what it was; nothing but rounding depends on it.
    """
    exact = np.arange(len(entries.ids)) < np.repeat(entries.offsets[:-1] + entries.num_exact, entries.counts)
    if isinstance(codec, Threshold):
        assert noise is not None
        num_head = entries.num_exact.astype(np.int64)
        head_gaps, order = _gaps(ranks.rank(entries.ids[exact]), num_head)
        tail_gaps, _ = _gaps(ranks.rank(entries.ids[~exact]), entries.counts - num_head)
        codes = _shares(entries.weights[exact][order].astype(np.float64), num_head, noise)
        last = entries.counts == num_head  # nothing is left for a tail: the last share is all of the rest
        last &= num_head > 0
        codes[ends(num_head)[1:][last] - 1] = HEAD_LEVELS
        return {
            "num_head": num_head.astype(np.uint16),
            "num_tail": (entries.counts - num_head).astype(np.uint16),
            "head_gaps": head_gaps,
            "head_codes": codes,
            "tail_gaps": tail_gaps,
        }
    gaps, order = _gaps(ranks.rank(entries.ids), entries.counts)
    weights = entries.weights[order].astype(np.float64)
    columns: Columns = {"num_ids": entries.counts.astype(np.uint16), "gaps": gaps}
    if isinstance(codec, Sample):
        return {**columns, "draws": np.rint(weights * codec.draws).astype(np.uint16)}
    codes = np.minimum(np.sqrt(weights) * TOPK_LEVELS, TOPK_LEVELS - 1)
    tail = np.arcsin(np.sqrt(np.minimum(np.exp(entries.log_tail.astype(np.float64)), 1.0))) / (np.pi / 2)
    return {
        **columns,
        "codes": codes.astype(np.uint8),
        "tail_code": np.rint(tail * TAIL_LEVELS).astype(np.uint16),
    }


def unpack(codec: SparseCodec, columns: Columns, ranks: Ranks) -> Entries:
    """The entries that `pack` was given: ids to the bit, weights to the layout's error."""
    if isinstance(codec, Threshold):
        return _unpack_threshold(columns, ranks)
    counts = columns["num_ids"].astype(np.int64)
    offsets = ends(counts)
    ids = ranks.id(_from_gaps(columns["gaps"], offsets))
    none = np.full(len(counts), -np.inf, np.float32)
    if isinstance(codec, Sample):
        weights = columns["draws"].astype(np.float32) / np.float32(codec.draws)
        return Entries(offsets, ids, weights, np.zeros(len(counts), np.int32), none)
    mass = ((columns["codes"].astype(np.float64) + 0.5) / TOPK_LEVELS) ** 2
    tail = np.sin(columns["tail_code"].astype(np.float64) * (np.pi / 2 / TAIL_LEVELS)) ** 2
    total = np.add.reduceat(mass, offsets[:-1][counts > 0]) if len(mass) else np.zeros(0)
    scale = np.ones(len(counts))
    scale[counts > 0] = (1 - tail[counts > 0]) / total
    weights = (mass * np.repeat(scale, counts)).astype(np.float32)
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail).astype(np.float32)
    return Entries(offsets, ids, weights, counts.astype(np.int32), log_tail)


def _unpack_threshold(columns: Columns, ranks: Ranks) -> Entries:
    num_head, num_tail = columns["num_head"].astype(np.int64), columns["num_tail"].astype(np.int64)
    head_ends, tail_ends = ends(num_head), ends(num_tail)
    offsets = head_ends + tail_ends
    shares = HEAD_SHARES[columns["head_codes"]]
    head = np.empty(len(shares))
    left = np.ones(len(num_head))
    for turn in range(int(num_head.max(initial=0))):  # at most 1 / tau turns, each over fewer positions
        here = np.flatnonzero(num_head > turn)
        place = head_ends[here] + turn
        head[place] = left[here] * shares[place]
        left[here] *= 1 - shares[place]
    ids = np.empty(offsets[-1], np.int32)
    weights = np.empty(offsets[-1], np.float32)
    at_head, at_tail = ranges(offsets[:-1], num_head), ranges(offsets[:-1] + num_head, num_tail)
    ids[at_head] = ranks.id(_from_gaps(columns["head_gaps"], head_ends))
    ids[at_tail] = ranks.id(_from_gaps(columns["tail_gaps"], tail_ends))
    weights[at_head] = head
    weights[at_tail] = np.repeat(left / np.maximum(num_tail, 1), num_tail)
    none = np.full(len(num_head), -np.inf, np.float32)
    return Entries(offsets, ids, weights, num_head.astype(np.int32), none)


def _shares(
    weights: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], noise: npt.NDArray[np.float64]
) -> npt.NDArray[np.uint8]:
    """The code of each weight as a share of what the weights before it left over, rounded without bias."""
    before = np.cumsum(weights) - weights
    starts = ends(counts)[:-1]
    filled = counts > 0
    before -= np.repeat(before[starts[filled]], counts[filled])
    share = np.clip(weights / np.maximum(1 - before, 1e-300), 0.0, 1.0)
    low = np.minimum(
        (np.arcsin(np.sqrt(share)) / (np.pi / 2 / HEAD_LEVELS)).astype(np.int64), HEAD_LEVELS - 1
    )
    low -= share < HEAD_SHARES[low]  # where the arcsine's own rounding went past a step
    step = HEAD_SHARES[low + 1] - HEAD_SHARES[low]
    codes: npt.NDArray[np.uint8] = (low + (noise < (share - HEAD_SHARES[low]) / step)).astype(np.uint8)
    return codes


def _gaps(
    ranks: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Ranks sorted within each position, as the number of ranks skipped before each; and that order."""
    order = np.lexsort((ranks, np.repeat(np.arange(len(counts)), counts)))
    ranks = ranks[order]
    gaps = np.diff(ranks, prepend=-1) - 1
    first = ends(counts)[:-1][counts > 0]
    gaps[first] = ranks[first]
    return gaps.astype(np.uint32), order


def _from_gaps(gaps: npt.NDArray[np.generic], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    total = np.cumsum(gaps, dtype=np.int64)
    total += np.arange(len(total))
    counts = np.diff(offsets)
    base = np.where(offsets[:-1] > 0, total[offsets[:-1] - 1] + 1, 0) if len(total) else offsets[:-1]
    ranks: npt.NDArray[np.int64] = total - np.repeat(base, counts)
    return ranks
