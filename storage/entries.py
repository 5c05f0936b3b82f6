"""Sparse targets in memory: a teacher's distributions at positions, as (id, weight) pairs.

An encoder (pipeline/codecs) makes them, a codec (storage/codecs.py) packs them into columns and unpacks them
into this form again, whatever the layout.

Shape letters: P positions, E entries of all positions.
"""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt


class Entries(NamedTuple):
    """Entries of P positions, concatenated: those of position p are `offsets[p]` to `offsets[p + 1]`.

    Weights are probabilities at temperature 1. Entries and tail of a position sum to 1. A position without
    entries has no target. Ids of a position are distinct; exact entries come before sampled ones.
    """

    offsets: npt.NDArray[np.int64]  # P + 1
    ids: npt.NDArray[np.int32]  # E
    weights: npt.NDArray[np.float32]  # E, probability
    num_exact: npt.NDArray[np.int32]  # P, leading entries that have the teacher's own probability
    log_tail: npt.NDArray[np.float32]  # P, nats: log mass of all ids that were left out; -inf for none

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Entries of each position."""
        return np.diff(self.offsets)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """The position of each entry."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    def take(self, positions: npt.NDArray[np.int64]) -> Self:
        """The entries of these positions, in this order."""
        counts = self.offsets[positions + 1] - self.offsets[positions]
        chosen = ranges(self.offsets[positions], counts)
        return type(self)(
            ends(counts), self.ids[chosen], self.weights[chosen],
            self.num_exact[positions], self.log_tail[positions],
        )  # fmt: skip

    def run(self, start: int, stop: int) -> Self:
        """The entries of positions start to stop, without a copy of their ids and weights."""
        first, last = self.offsets[start], self.offsets[stop]
        return type(self)(
            self.offsets[start : stop + 1] - first, self.ids[first:last], self.weights[first:last],
            self.num_exact[start:stop], self.log_tail[start:stop],
        )  # fmt: skip


def ends(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Offsets [P + 1] of concatenated lists of these lengths."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def ranges(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """start, start + 1, ... for each start, as many as its count, concatenated."""
    return np.arange(counts.sum()) + np.repeat(starts - ends(counts)[:-1], counts)


def concatenate(parts: "list[Entries]") -> Entries:
    """The positions of all parts, in order."""
    return Entries(
        ends(np.concatenate([part.counts for part in parts])),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.concatenate([part.num_exact for part in parts]),
        np.concatenate([part.log_tail for part in parts]),
    )
