"""Dense logits -> entries: the codecs. docs/codecs.md says how to choose one.

Each makes one pass of exponentials over the logits and keeps the sums of blocks of 256 ids. Block sums say
where the large probabilities can be, and where a draw lands, so that no codec sorts or cumulates a whole
vocabulary: what follows looks into a few blocks. Random numbers belong to the row and the position
(draws.py), so the entries of a position depend on its logits and its name alone.

Shape letters: P positions, V vocabulary, B blocks, K ids of a block, M draws of all positions.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline import draws
from storage.entries import Entries, concatenate, ends, ranges
from storage.spec import Sample, SparseCodec, Threshold, TopK

BLOCK = 256
CHUNK_BYTES = 8 * 2**20  # of exponentials in memory at a time
PASS_BYTES = 2 * 2**20  # of them that one pass after the other goes over, while they are in a core's cache
# A head entry is above 0.75 tau (its tail's r / m, with m = round(r / tau) >= 2), so none is missed here.
CANDIDATE = 0.6
# Tail entries stay this far below the step of the walk, so that rounding never lands on one twice.
MARGIN = 1e-5
LEAST = torch.finfo(torch.float32).min
SYSTEMATIC, ROUNDING = 0, 1  # streams of random numbers

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


class NotFinite(ValueError):
    """Logits of a position are no numbers."""

    def __init__(self, position: int) -> None:
        super().__init__(f"the logits of position {position} are not finite")
        self.position = position


class Keys(NamedTuple):
    """The names of P positions, for their random numbers."""

    rows: draws.Words  # P x 2, draws.row_words of each position's row
    positions: I64  # P, the place in its row

    def part(self, start: int, end: int) -> "Keys":
        """Positions start to end."""
        return Keys(self.rows[start:end], self.positions[start:end])


def sparsify(
    logits_PV: torch.Tensor, codec: SparseCodec, keys: Keys, vocab_size: int | None = None
) -> Entries:
    """The entries of every position: what `codec` keeps of softmax(logits) at temperature 1.

    As `sparsify_and_measure`, without the entropies.
    """
    return sparsify_and_measure(logits_PV, codec, keys, vocab_size)[0]


def sparsify_and_measure(
    logits_PV: torch.Tensor, codec: SparseCodec, keys: Keys, vocab_size: int | None = None
) -> tuple[Entries, F64]:
    """(the entries of every position, the entropy of each position's distribution [P], nats).

    Columns from `vocab_size` on are padding: they are never kept and have no mass. Logits of any floating
    dtype on any device. Raises NotFinite for the first position with a NaN or an infinity.
    """
    logits_PV = logits_PV[:, :vocab_size]
    rows = max(1, CHUNK_BYTES // (4 * logits_PV.shape[1]))
    width = -(-logits_PV.shape[1] // BLOCK) * BLOCK
    room = torch.empty(min(rows, len(logits_PV)), width, device=logits_PV.device)  # fresh pages are dear
    parts, entropies = [], [np.zeros(0)]
    for start in range(0, len(logits_PV), rows):
        part = keys.part(start, start + rows)
        blocks = _Blocks(logits_PV[start : start + rows], room)
        if not np.isfinite(blocks.mass).all():
            raise NotFinite(start + int(np.flatnonzero(~np.isfinite(blocks.mass))[0]))
        entropies.append(blocks.entropy)
        if isinstance(codec, TopK):
            parts.append(_top(blocks, codec.k))
        elif isinstance(codec, Sample):
            parts.append(_sample(blocks, codec, part))
        else:
            parts.append(_threshold(blocks, codec, part))
    return concatenate(parts), np.concatenate(entropies)


def rounding_noise(codec: SparseCodec, entries: Entries, keys: Keys) -> F64 | None:
    """The random numbers that the compact layout rounds exact entries with; None where it does not."""
    if not isinstance(codec, Threshold):
        return None
    counts = entries.num_exact.astype(np.int64)
    most = int(counts.max(initial=0))
    noise = draws.uniforms(codec.seed, keys.rows, keys.positions, most, ROUNDING)
    return noise[np.arange(most) < counts[:, None]]


class _Blocks:
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

    def look(self, positions: I64, blocks: I64) -> F64:
        """The exponentials of some blocks: [N, K]."""
        at = (torch.from_numpy(positions).to(self.exps.device), torch.from_numpy(blocks).to(self.exps.device))
        found: F64 = self._view[at].double().cpu().numpy()
        return found

    def largest(self) -> torch.Tensor:
        """The largest exponential of each block: [P, B]."""
        return self._view.amax(-1)

    def above(self, bounds: F64, may_hold: npt.NDArray[np.bool_]) -> "_Found":
        """All ids whose exponential reaches its position's bound, largest first (ties by id), by position.

        Only blocks [P, B] that `may_hold` one are looked into.
        """
        positions, blocks = np.nonzero(may_hold)
        values = self.look(positions, blocks)
        which, inside = np.nonzero(values >= bounds[positions, None])
        found, position, ids = values[which, inside], positions[which], blocks[which] * BLOCK + inside
        order = np.lexsort((ids, -found, position))
        return _Found(position[order], ids[order], found[order])

    def remove(self, positions: I64, ids: I64) -> None:
        """Take ids out: what is left in `exps` and `sums` is the tail. `mass` stays that of all."""
        if len(ids) == 0:
            return
        device = self.exps.device
        self.exps[torch.from_numpy(positions).to(device), torch.from_numpy(ids).to(device)] = 0
        touched = np.unique(positions * self.num_blocks + ids // BLOCK)
        position, block = np.divmod(touched, self.num_blocks)
        self.sums[position, block] = self.look(position, block).sum(1)

    def land(self, counts: I64, points: F64) -> I64:
        """The id that each point falls on, when the exponentials of a position are laid end to end.

        `counts` points of each position, laid end to end, each in [0, sum of its position).
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
        inside = np.cumsum(self.look(owners, block), axis=1)
        total, held = inside[:, -1], self.sums[owners, block]
        # Block sums were rounded otherwise than these: a point keeps its share of the block.
        local = (points - (edges[owners, block] - held)) * (total / np.where(held > 0, held, 1))
        local = np.clip(local, 0, np.nextafter(total, 0))
        ids: I64 = block * BLOCK + (inside <= local[:, None]).sum(1)
        return ids


class _Found(NamedTuple):
    """Ids with their exponentials, sorted by position, then largest first."""

    positions: I64
    ids: I64
    values: F64


def _top(blocks: _Blocks, k: int) -> Entries:
    num, k = len(blocks), min(k, blocks.num_blocks * BLOCK)
    if k < blocks.num_blocks:  # k blocks have an id at least as large as the k-th largest block's largest
        largest = blocks.largest()
        bounds: F64 = largest.topk(k).values[:, -1].double().cpu().numpy()
        may_hold = largest.double().cpu().numpy() >= bounds[:, None]
    else:
        bounds, may_hold = np.zeros(num), np.ones((num, blocks.num_blocks), bool)
    found = blocks.above(bounds, may_hold)
    has = np.bincount(found.positions, minlength=num)
    counts = np.minimum(has, k)
    chosen = ranges(ends(has)[:-1], counts)
    real = chosen[found.values[chosen] > 0]  # the last block's padding and what float32 cannot hold are none
    positions, ids, values = found.positions[real], found.ids[real], found.values[real]
    counts = np.bincount(positions, minlength=num)
    blocks.remove(positions, ids)
    left = blocks.sums.sum(1)
    kept = np.bincount(positions, values, minlength=num)
    with np.errstate(divide="ignore"):
        log_tail = np.log(left / (kept + left))
    weights = values / (kept + left)[positions]
    return _entries(counts, ids, weights, counts, log_tail)


def _sample(blocks: _Blocks, codec: Sample, keys: Keys) -> Entries:
    num = len(blocks)
    points = draws.uniforms(codec.seed, keys.rows, keys.positions, codec.draws) * blocks.mass[:, None]
    ids = blocks.land(np.full(num, codec.draws), points.reshape(-1))
    owners = np.repeat(np.arange(num), codec.draws)
    both, times = np.unique(owners * (blocks.num_blocks * BLOCK) + ids, return_counts=True)
    positions, ids = np.divmod(both, blocks.num_blocks * BLOCK)
    counts = np.bincount(positions, minlength=num)
    return _entries(counts, ids, times / codec.draws, np.zeros(num, np.int64), np.full(num, -np.inf))


def _threshold(blocks: _Blocks, codec: Threshold, keys: Keys) -> Entries:
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
    start = draws.uniforms(codec.seed, keys.rows, keys.positions, 1, SYSTEMATIC)[:, 0]
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


def _heads(found: _Found, mass: F64, tau: float) -> tuple[I64, I64]:
    """(ids kept exactly, ids to sample) of each position.

    The smallest head h with t_(h+1) <= r / m, where r is the mass behind the head and m = max(1, round(r /
    tau)): then no id of the tail is longer than a step of the walk, and none is met twice.
    """
    num = len(mass)
    has = np.bincount(found.positions, minlength=num)
    most = int(has.max(initial=0))
    large_PH = np.zeros((num, most + 1))  # probabilities, largest first, then zeros
    large_PH[:, :most][np.arange(most) < has[:, None]] = found.values / mass[found.positions]
    rest_PH = 1 - np.concatenate([np.zeros((num, 1)), np.cumsum(large_PH[:, :-1], axis=1)], axis=1)
    steps_PH = np.maximum(1, np.rint(rest_PH / tau))
    enough = (steps_PH == 1) | (large_PH <= (1 - MARGIN) * rest_PH / steps_PH)
    head = enough.argmax(1)  # the last column is always enough: nothing large is left
    return head, steps_PH[np.arange(num), head].astype(np.int64)


def _entries(counts: I64, ids: I64, weights: F64, num_exact: I64, log_tail: F64) -> Entries:
    return Entries(
        ends(counts), ids.astype(np.int32), weights.astype(np.float32),
        num_exact.astype(np.int32), log_tail.astype(np.float32),
    )  # fmt: skip
