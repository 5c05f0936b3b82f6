"""The arithmetic of the compact layout: ids and weights -> small integers that compress well, and back.

Ids become ranks (frequent ids first, by a table), are sorted within a position, and only the gaps are stored.
Weights become codes on a grid of arcsines, on which a step costs the same everywhere (the variance-
stabilising transform of a proportion: Anscombe 1948). What can be computed from other columns is not stored:
the weights of sampled entries, and one degree of freedom of the exact ones. Which codec stores which column
is in storage/codecs.py; docs/cache-format.md defines each column to the bit.

Shape letters: P positions, E entries, R ranked ids.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.entries import ends

HEAD_LEVELS = 63  # steps of a head code: its error is a hundredth of the variance of the sampling
TAIL_LEVELS = 65_535
TOPK_LEVELS = 256  # steps of the square root of a probability
MAX_RANKED = 65_536
DENSE_TABLE = 2**22  # vocabularies up to this size are looked up in one array

Columns = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

_THETA = np.linspace(0.0, np.pi / 2, HEAD_LEVELS + 1)
HEAD_SHARES = np.sin(_THETA) ** 2  # the share of the remaining mass that a code is
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
        """The id of each rank. Raises IndexError for a rank outside the vocabulary."""
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


def root_codes(weights: Floats) -> npt.NDArray[np.uint8]:
    """Probabilities as steps of their square roots, rounded down."""
    codes: Floats = np.minimum(np.sqrt(weights) * TOPK_LEVELS, TOPK_LEVELS - 1)
    return codes.astype(np.uint8)


def root_masses(codes: npt.NDArray[np.generic]) -> Floats:
    """The probability in the middle of each step of `root_codes`."""
    masses: Floats = ((codes.astype(np.float64) + 0.5) / TOPK_LEVELS) ** 2
    return masses


def tail_codes(log_tail_P: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The mass of a position's tail as steps of its arcsine."""
    tail = np.arcsin(np.sqrt(np.minimum(np.exp(log_tail_P.astype(np.float64)), 1.0))) / (np.pi / 2)
    codes: Floats = np.rint(tail * TAIL_LEVELS)
    return codes.astype(np.uint16)


def tail_masses(codes_P: npt.NDArray[np.generic]) -> Floats:
    """The mass of each of `tail_codes` [P]."""
    masses: Floats = np.sin(codes_P.astype(np.float64) * (np.pi / 2 / TAIL_LEVELS)) ** 2
    return masses


def rescaled(masses: Floats, counts_P: Counts, totals_P: Floats) -> npt.NDArray[np.float32]:
    """Masses [E] in proportion, so that those of each position sum to its total."""
    offsets, filled = ends(counts_P), counts_P > 0
    sums = np.add.reduceat(masses, offsets[:-1][filled]) if len(masses) else np.zeros(0)
    scale = np.ones(len(counts_P))
    scale[filled] = totals_P[filled] / sums
    return (masses * np.repeat(scale, counts_P)).astype(np.float32)


def head_masses(codes: npt.NDArray[np.generic], counts_P: Counts) -> tuple[Floats, Floats]:
    """(the mass of each of `share_codes` [E], what is left of each position [P])."""
    first, shares = ends(counts_P), HEAD_SHARES[codes]
    head = np.empty(len(shares))
    left = np.ones(len(counts_P))
    for turn in range(int(counts_P.max(initial=0))):  # at most 1 / tau turns, each over fewer positions
        here = np.flatnonzero(counts_P > turn)
        place = first[here] + turn
        head[place] = left[here] * shares[place]
        left[here] *= 1 - shares[place]
    return head, left


def share_codes(weights: Floats, counts: Counts, noise: Floats) -> npt.NDArray[np.uint8]:
    """The code of each weight as a share of the mass that the weights before it leave, rounded without bias.

    `noise`: a uniform number in [0, 1) for each weight. It decides whether a share is rounded up or down.
    """
    before = np.cumsum(weights) - weights
    starts = ends(counts)[:-1]
    filled = counts > 0
    before -= np.repeat(before[starts[filled]], counts[filled])
    share = np.clip(weights / np.maximum(1 - before, 1e-300), 0.0, 1.0)
    low = np.minimum(
        (np.arcsin(np.sqrt(share)) / (np.pi / 2 / HEAD_LEVELS)).astype(np.int64), HEAD_LEVELS - 1
    )
    low -= share < HEAD_SHARES[low]  # where rounding of the arcsine went past a step
    step = HEAD_SHARES[low + 1] - HEAD_SHARES[low]
    codes: npt.NDArray[np.uint8] = (low + (noise < (share - HEAD_SHARES[low]) / step)).astype(np.uint8)
    return codes


def gaps_of(ranks: Counts, counts: Counts) -> tuple[npt.NDArray[np.uint32], Counts]:
    """Ranks sorted within each position, as the number of ranks skipped before each; and that order."""
    order = np.lexsort((ranks, np.repeat(np.arange(len(counts)), counts)))
    ranks = ranks[order]
    gaps = np.diff(ranks, prepend=-1) - 1
    first = ends(counts)[:-1][counts > 0]
    gaps[first] = ranks[first]
    return gaps.astype(np.uint32), order


def ranks_of(gaps: npt.NDArray[np.generic], offsets: Counts) -> Counts:
    """The ranks that `gaps_of` was given, in ascending order within each position."""
    total = np.cumsum(gaps, dtype=np.int64)
    total += np.arange(len(total))
    counts = np.diff(offsets)
    base = np.where(offsets[:-1] > 0, total[offsets[:-1] - 1] + 1, 0) if len(total) else offsets[:-1]
    ranks: npt.NDArray[np.int64] = total - np.repeat(base, counts)
    return ranks
