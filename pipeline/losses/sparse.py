"""Losses on sparse targets: entries of top-k with a tail bucket, and sampled entries.

Shape letters: P positions, V vocabulary or classes, E entries of all positions.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import log_softmax

from storage.entries import Entries

SMALLEST = 1e-30  # a probability that stands for none, so that its log is a number


class SparseTargets(NamedTuple):
    """Entries of P positions as tensors (storage.entries.Entries): probabilities at temperature 1."""

    positions: torch.Tensor  # E, int64: the position of each entry, ascending
    ids: torch.Tensor  # E, int64
    weights: torch.Tensor  # E, float
    log_tail: torch.Tensor  # P, float: log mass of all other ids, -inf for none

    @classmethod
    def of(cls, entries: Entries) -> "SparseTargets":
        """These entries as tensors."""
        return cls(
            torch.from_numpy(entries.positions), torch.from_numpy(entries.ids.astype(np.int64)),
            torch.from_numpy(entries.weights), torch.from_numpy(entries.log_tail),
        )  # fmt: skip

    def logits(self, num_classes: int) -> torch.Tensor:
        """Logits [P, num_classes] that these entries stand for, the tail spread evenly over all other ids.

        For metrics: a sampled id has its weight, one that was not drawn has almost nothing.
        """
        others = num_classes - torch.bincount(self.positions, minlength=len(self.log_tail)).float()
        even = (self.log_tail.exp() / others.clamp(min=1)).clamp(min=SMALLEST)
        probs = even[:, None].repeat(1, num_classes)
        weights = self.weights.clamp(min=SMALLEST)
        logits: torch.Tensor = probs.index_put((self.positions, self.ids), weights).log()
        return logits

    def to(self, device: torch.device | str) -> "SparseTargets":
        """The same targets on another device."""
        return SparseTargets(*(tensor.to(device) for tensor in self))


def bucket_kl(student_PV: torch.Tensor, targets: SparseTargets, temperature: float = 1.0) -> torch.Tensor:
    """KL on the kept ids S and one bucket for all others, in nats, mean over positions.

        KL(Bern(a) || Bern(b)) + a T^2 KL_T(t | S || p | S),    a = sum of t over S, b = sum of p over S

    The temperature acts inside S alone: a bucket that was tempered as one lump would charge a student that
    equals its teacher. At T = 1 this is sum_S t log(t / p) + (1 - a) log((1 - a) / (1 - b)), a lower bound of
    the full KL whose gradient on S is p - t exactly. For top-k targets.
    """
    num, wide = len(student_PV), torch.promote_types(student_PV.dtype, torch.float32)
    log_student = log_softmax(student_PV.to(wide), dim=-1)
    log_t, log_p = targets.weights.to(wide).log(), log_student[targets.positions, targets.ids]
    log_a, log_b = log_sums(log_t, targets.positions, num), log_sums(log_p, targets.positions, num)
    others = log_student.index_put((targets.positions, targets.ids), log_p.new_tensor(-torch.inf))
    log_not_b = others.logsumexp(-1)  # summed, not subtracted: the tail can be the smallest part by far
    log_not_a = targets.log_tail.to(wide)
    bernoulli = weighted(log_a, log_a - log_b) + weighted(log_not_a, log_not_a - log_not_b)
    inside = [
        logs / temperature - log_sums(logs / temperature, targets.positions, num)[targets.positions]
        for logs in (log_t, log_p)
    ]
    within = student_PV.new_zeros(num, dtype=wide).index_add(
        0, targets.positions, weighted(inside[0], inside[0] - inside[1])
    )
    kept = torch.zeros(num, dtype=torch.bool, device=log_student.device)
    kept[targets.positions] = True
    loss: torch.Tensor = bernoulli + log_a.exp() * temperature**2 * within
    return torch.where(kept, loss, 0).sum() / num


def sampled_kl(student_PV: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """sum_E w log(w / p), in nats, mean over positions: for sampled targets.

    Its gradient in the logits, W p - w with W = sum of w, is that of the full KL in the mean over draws; its
    value is larger by a constant that no student changes. Random sampling: Anshumann et al., ACL 2025.
    """
    wide = torch.promote_types(student_PV.dtype, torch.float32)
    log_student = log_softmax(student_PV.to(wide), dim=-1)[targets.positions, targets.ids]
    weights = targets.weights.to(wide)
    loss: torch.Tensor = (torch.special.xlogy(weights, weights) - weights * log_student).sum()
    return loss / len(student_PV)


def log_sums(logs_E: torch.Tensor, positions_E: torch.Tensor, num: int) -> torch.Tensor:
    """The log of the sum of the exponentials of each position's entries [P]; -inf where it has none."""
    with torch.no_grad():
        largest = logs_E.new_full((num,), -torch.inf).scatter_reduce(0, positions_E, logs_E, "amax")
        largest = largest.nan_to_num(neginf=0.0)
    total = logs_E.new_zeros(num).index_add(0, positions_E, (logs_E - largest[positions_E]).exp())
    return total.log() + largest


def weighted(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """exp(log_weight) value, and 0 where the weight is 0 (also in the gradient)."""
    nothing = log_weight.isneginf()
    return torch.where(nothing, 0, log_weight.exp() * torch.where(nothing, 0, value))
