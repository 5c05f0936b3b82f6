"""Losses: pure functions of tensors, in nats, averaged over the positions (or rows) of a batch.

    loss = alpha CE + (1 - alpha) soft,    soft = T^2 KL(teacher_T || student_T) on dense targets

CE counts labelled positions only and divides by their number; soft losses count every position and divide by
the number of positions, never by the number of classes. T^2 (Hinton et al. 2015, section 2) keeps the size of
the soft gradient independent of T; it is applied in `tempered_kl` and nowhere else.

On sparse targets a divergence must not read the student where the teacher was not kept. Two can be had:
`bucket_kl` (top-k: the rest is one bucket) and `sampled_kl` (sampled: unbiased). Others are refused, see
targets.refuse_truncated.

Shape letters: P positions, V vocabulary or classes, E entries of all positions.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from pipeline.data import NO_LABEL
from storage.entries import Entries

SMALLEST = 1e-30  # a probability that stands for none, so that its log is a number

Divergence = Literal["forward", "reverse", "jsd", "skewed"]


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


class MixedTargets(NamedTuple):
    """What M teachers say of P positions: their logits at temperature 1, and how much each counts."""

    logits: torch.Tensor  # M x P x V
    weights: torch.Tensor  # M, their sum is 1

    def at(self, temperature: float | torch.Tensor) -> torch.Tensor:
        """Logits [P, V] that stand for the mean of the teachers' probabilities at this temperature.

            softmax(at(T) / T) = sum over m of w_m softmax(logits_m / T)

        Probabilities are averaged, not logits, after tempering: the arithmetic mean of an ensemble (Hinton
        et al. 2015), to which the forward KL is, up to a constant, the mean of the KLs to each teacher. T is
        one number, or one a position [P, 1].
        """
        logs = log_softmax(self.logits / temperature, dim=-1) + self.weights.log()[:, None, None]
        mean: torch.Tensor = temperature * logs.logsumexp(0)
        return mean

    def to(self, device: torch.device | str) -> "MixedTargets":
        """The same targets on another device."""
        return MixedTargets(*(tensor.to(device) for tensor in self))


def label_loss(logits_PV: torch.Tensor, labels_P: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, mean over labelled positions; 0, with a gradient of 0, where none has one."""
    total = cross_entropy(logits_PV, labels_P, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels_P != NO_LABEL).sum().clamp(min=1)


def tempered_kl(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float | torch.Tensor
) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each position [P], over the last dimension.

    Arguments are logits or log-probabilities: a constant a position changes nothing. T is one number, or one
    a position [P, 1].
    """
    said = log_softmax(student / temperature, dim=-1)
    wanted = log_softmax(teacher / temperature, dim=-1)
    return (temperature**2 * kl_div(said, wanted, log_target=True, reduction="none").sum(-1, True)).squeeze(
        -1
    )


def sure_temperature(teacher_PC: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A temperature a position [P, 1], higher where the teacher is surer: logits in, at T = 1.

        T = low + (high - low) (c - 1/C) / (1 - 1/C),    c = the teacher's largest probability, C classes

    So `low` where all classes are equally likely and `high` where one is certain: what a sure teacher says of
    the other classes is softened most. After dynamic temperature distillation (Wen, Lai and Qian 2019,
    arXiv:1911.07471; TextBrewer's flsw and cwsm), which looks at the student and at the rest of the batch
    too; here a row has its temperature from the teacher alone, the same at every step.
    """
    even = 1 / teacher_PC.shape[-1]
    sure = (teacher_PC.softmax(-1).amax(-1, keepdim=True) - even) / (1 - even)
    return low + (high - low) * sure


def distillation_loss(
    student_PV: torch.Tensor,
    teacher_PV: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    divergence: Divergence = "forward",
    skew: float = 0.1,
) -> torch.Tensor:
    """The divergence of student from teacher on dense targets, in nats, mean over positions.

    With t the teacher and p the student, both at temperature T, times T^2:
    forward: KL(t || p). reverse: KL(p || t) (Gu et al. 2024, MiniLLM). jsd: (KL(t || m) + KL(p || m)) / 2
    with m = (t + p) / 2 (Agarwal et al. 2024, GKD). skewed: KL(t || skew t + (1 - skew) p) (Ko et al. 2024,
    DistiLLM). Arguments are logits; T is one number, or one a position [P, 1].
    """
    if divergence == "forward":
        return tempered_kl(student_PV, teacher_PV, temperature).mean()
    if divergence == "reverse":
        return tempered_kl(teacher_PV, student_PV, temperature).mean()
    said, wanted = log_softmax(student_PV / temperature, -1), log_softmax(teacher_PV / temperature, -1)
    part = 0.5 if divergence == "jsd" else skew
    mixed = torch.logaddexp(wanted + _log(part), said + _log(1 - part))
    loss = kl_div(mixed, wanted, log_target=True, reduction="none").sum(-1, True)
    if divergence == "jsd":
        loss = (loss + kl_div(mixed, said, log_target=True, reduction="none").sum(-1, True)) / 2
    return (temperature**2 * loss).mean()


def bucket_kl(student_PV: torch.Tensor, targets: SparseTargets, temperature: float = 1.0) -> torch.Tensor:
    """KL on the kept ids S and one bucket for all others, in nats, mean over positions.

        KL(Bern(a) || Bern(b)) + a T^2 KL_T(t | S || p | S),    a = sum of t over S, b = sum of p over S

    The temperature acts inside S alone: a bucket that was tempered as one lump would charge a student that
    equals its teacher. At T = 1 this is sum_S t log(t / p) + (1 - a) log((1 - a) / (1 - b)), a lower bound of
    the full KL whose gradient on S is p - t exactly. For top-k targets.
    """
    num, wide = len(student_PV), torch.promote_types(student_PV.dtype, torch.float32)
    said = log_softmax(student_PV.to(wide), dim=-1)
    log_t, log_p = targets.weights.to(wide).log(), said[targets.positions, targets.ids]
    log_a, log_b = _log_sums(log_t, targets.positions, num), _log_sums(log_p, targets.positions, num)
    others = said.index_put((targets.positions, targets.ids), log_p.new_tensor(-torch.inf))
    log_not_b = others.logsumexp(-1)  # summed, not subtracted: the tail can be the smallest part by far
    log_not_a = targets.log_tail.to(wide)
    bernoulli = _weighted(log_a, log_a - log_b) + _weighted(log_not_a, log_not_a - log_not_b)
    inside = [
        logs / temperature - _log_sums(logs / temperature, targets.positions, num)[targets.positions]
        for logs in (log_t, log_p)
    ]
    within = student_PV.new_zeros(num, dtype=wide).index_add(
        0, targets.positions, _weighted(inside[0], inside[0] - inside[1])
    )
    kept = torch.zeros(num, dtype=torch.bool, device=said.device)
    kept[targets.positions] = True
    loss: torch.Tensor = bernoulli + log_a.exp() * temperature**2 * within
    return torch.where(kept, loss, 0).sum() / num


def sampled_kl(student_PV: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """sum_E w log(w / p), in nats, mean over positions: for sampled targets.

    Its gradient in the logits, W p - w with W = sum of w, is that of the full KL in the mean over draws; its
    value is larger by a constant that no student changes. Random sampling: Anshumann et al., ACL 2025.
    """
    wide = torch.promote_types(student_PV.dtype, torch.float32)
    said = log_softmax(student_PV.to(wide), dim=-1)[targets.positions, targets.ids]
    weights = targets.weights.to(wide)
    loss: torch.Tensor = (torch.special.xlogy(weights, weights) - weights * said).sum() / len(student_PV)
    return loss


def recipe_loss(
    student_PV: torch.Tensor,
    labels_P: torch.Tensor,
    teacher: torch.Tensor | SparseTargets | MixedTargets,
    alpha: float,
    temperature: float | torch.Tensor,
    divergence: Divergence = "forward",
    skew: float = 0.1,
    sampled: bool = False,
) -> torch.Tensor:
    """alpha CE + (1 - alpha) soft. A part with weight 0 is not computed.

    `teacher` are logits (of several teachers: MixedTargets), or entries: of a sampling codec (`sampled`), or
    of top-k. A temperature for each position [P, 1] needs logits.
    """
    if alpha == 1:
        return label_loss(student_PV, labels_P)
    if isinstance(teacher, MixedTargets):
        teacher = teacher.at(temperature)
    if isinstance(teacher, torch.Tensor):
        soft = distillation_loss(student_PV, teacher, temperature, divergence, skew)
    elif sampled:
        soft = sampled_kl(student_PV, teacher)
    else:
        assert isinstance(temperature, int | float)  # one a row was refused: targets.refuse_truncated
        soft = bucket_kl(student_PV, teacher, temperature)
    soft = (1 - alpha) * soft
    return soft if alpha == 0 else alpha * label_loss(student_PV, labels_P) + soft


def pseudo_labels(labels_P: torch.Tensor, teacher_PV: torch.Tensor) -> torch.Tensor:
    """The labels [P], and the teacher's first choice where there is none (Lee 2013)."""
    return torch.where(labels_P == NO_LABEL, teacher_PV.argmax(-1), labels_P)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _log_sums(logs_E: torch.Tensor, positions_E: torch.Tensor, num: int) -> torch.Tensor:
    """The log of the sum of the exponentials of each position's entries [P]; -inf where it has none."""
    with torch.no_grad():
        largest = logs_E.new_full((num,), -torch.inf).scatter_reduce(0, positions_E, logs_E, "amax")
        largest = largest.nan_to_num(neginf=0.0)
    total = logs_E.new_zeros(num).index_add(0, positions_E, (logs_E - largest[positions_E]).exp())
    return total.log() + largest


def _weighted(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """exp(log_weight) value, and 0 where the weight is 0 (also in the gradient)."""
    nothing = log_weight.isneginf()
    return torch.where(nothing, 0, log_weight.exp() * torch.where(nothing, 0, value))
