"""Exponentials of a chunk of positions and their sums over blocks of 256 ids, for all encoders.

Shape letters: P positions, V vocabulary, B blocks, K ids of a block.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.counter_rng import I64
from storage.entries import ends

BLOCK = 256
PASS_BYTES = 2 * 2**20  # of logits that all passes go over while they are in a core's cache
LEAST = torch.finfo(torch.float32).min

F64 = npt.NDArray[np.float64]


class BlockSums:
    """Exponentials of a chunk of positions, exp(logit - largest), their sums by blocks of ids, entropies."""

    def __init__(self, logits_PV: torch.Tensor, room: torch.Tensor) -> None:
        num, vocab = logits_PV.shape
        self.exps = room[:num]
        self.exps[:, vocab:] = 0
        self.num_blocks = self.exps.shape[1] // BLOCK
        self._view = self.exps.view(num, self.num_blocks, BLOCK)
        sums_PB = torch.empty(num, self.num_blocks, device=logits_PV.device)
        energy_P = torch.empty(num, device=logits_PV.device)
        rows = max(1, PASS_BYTES // (4 * vocab)) if logits_PV.device.type == "cpu" else num
        scratch = torch.empty(min(rows, num), vocab, device=logits_PV.device)
        for start in range(0, num, rows):
            part = slice(start, start + rows)
            logits = logits_PV[part]
            shifted = torch.sub(logits, logits.amax(1, keepdim=True).float(), out=scratch[: len(logits)])
            exps = torch.exp(shifted, out=self.exps[part, :vocab])
            torch.sum(self._view[part], -1, out=sums_PB[part])
            energy_P[part] = shifted.clamp_(min=LEAST).mul_(exps).sum(1)  # no 0 times -inf
        self.sums: F64 = sums_PB.double().cpu().numpy()
        self.mass: F64 = self.sums.sum(1)  # P
        with np.errstate(invalid="ignore"):
            self.entropy: F64 = np.log(self.mass) - energy_P.double().cpu().numpy() / self.mass

    def __len__(self) -> int:
        return len(self.sums)

    def read(self, positions: I64, blocks: I64) -> F64:
        """The exponentials of some blocks: [N, K]."""
        at = (torch.from_numpy(positions).to(self.exps.device), torch.from_numpy(blocks).to(self.exps.device))
        found: F64 = self._view[at].double().cpu().numpy()
        return found

    def largest(self) -> torch.Tensor:
        """The largest exponential of each block: [P, B]."""
        return self._view.amax(-1)

    def above(self, bounds: F64, may_hold: npt.NDArray[np.bool_]) -> "FoundIds":
        """All ids whose exponential reaches its position's bound, by position, largest first (ties by id).

        Only the blocks [P, B] of `may_hold` are searched.
        """
        positions, blocks = np.nonzero(may_hold)
        values = self.read(positions, blocks)
        which, inside = np.nonzero(values >= bounds[positions, None])
        found, position, ids = values[which, inside], positions[which], blocks[which] * BLOCK + inside
        order = np.lexsort((ids, -found, position))
        return FoundIds(position[order], ids[order], found[order])

    def remove(self, positions: I64, ids: I64) -> None:
        """Remove ids, so that `exps` and `sums` are those of the tail. `mass` stays that of all ids."""
        if len(ids) == 0:
            return
        device = self.exps.device
        self.exps[torch.from_numpy(positions).to(device), torch.from_numpy(ids).to(device)] = 0
        touched = np.unique(positions * self.num_blocks + ids // BLOCK)
        position, block = np.divmod(touched, self.num_blocks)
        self.sums[position, block] = self.read(position, block).sum(1)

    def land(self, counts: I64, points: F64) -> I64:
        """The id whose interval has each point, where a position's exponentials are intervals one after the
        other.

        `counts` points of each position, concatenated, each in [0, sum of its position).
        """
        owners = np.repeat(np.arange(len(self)), counts)
        edges = np.cumsum(self.sums, axis=1)
        block = np.concatenate(
            [
                np.searchsorted(edge, points[start:end], side="right")
                for edge, start, end in zip(edges, ends(counts)[:-1], ends(counts)[1:], strict=True)
            ]
        )
        block = np.minimum(block, self.num_blocks - 1)
        inside = np.cumsum(self.read(owners, block), axis=1)
        total, held = inside[:, -1], self.sums[owners, block]
        # These sums are rounded differently from the block sums: a point keeps its share of the block.
        local = (points - (edges[owners, block] - held)) * (total / np.where(held > 0, held, 1))
        local = np.clip(local, 0, np.nextafter(total, 0))
        ids: I64 = block * BLOCK + (inside <= local[:, None]).sum(1)
        return ids


class FoundIds(NamedTuple):
    """Ids with their exponentials, sorted by position, then largest first."""

    positions: I64
    ids: I64
    values: F64
