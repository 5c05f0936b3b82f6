"""Losses: pure functions of tensors, in nats, averaged over the positions (or rows) of a batch.

    loss = alpha CE + (1 - alpha) soft,    soft = T^2 KL(teacher_T || student_T) on dense targets

CE counts labelled positions only and divides by their number; soft losses count every position and divide by
the number of positions, never by the number of classes. T^2 (Hinton et al. 2015, section 2) keeps the size of
the soft gradient independent of T; it is applied in `tempered_kl` and nowhere else.

On sparse targets a divergence must not read the student where the teacher was not kept. Two can be had:
`bucket_kl` (top-k: the rest is one bucket) and `sampled_kl` (sampled: unbiased). training.checks refuses
others.

Shape letters: P positions, V vocabulary or classes, E entries of all positions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import kl_div, log_softmax

Temperature = float | torch.Tensor


class MixedTargets(NamedTuple):
    """Targets of M teachers for P positions: their logits at temperature 1, and their weights."""

    logits: torch.Tensor  # M x P x V
    weights: torch.Tensor  # M, their sum is 1

    def at(self, temperature: Temperature) -> torch.Tensor:
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


def tempered_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: Temperature) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each position [P], over the last dimension.

    Arguments are logits or log-probabilities: a constant a position changes nothing. T is one number, or one
    a position [P, 1].
    """
    log_student = log_softmax(student / temperature, dim=-1)
    log_teacher = log_softmax(teacher / temperature, dim=-1)
    return (temperature**2 * _kl(log_teacher, log_student)).squeeze(-1)


def confidence_temperature(teacher_PC: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """A temperature a position [P, 1], higher where the teacher is surer: logits in, at T = 1.

        T = low + (high - low) (c - 1/C) / (1 - 1/C),    c = the teacher's largest probability, C classes

    So `low` where all classes are equally likely and `high` where one is certain: confident targets are
    softened most. After dynamic temperature distillation (Wen, Lai and Qian 2019,
    arXiv:1911.07471; TextBrewer's flsw and cwsm), which uses the student and the rest of the batch too;
    here the temperature of a row depends on the teacher alone, and is the same at every step.
    """
    even = 1 / teacher_PC.shape[-1]
    confidence = (teacher_PC.softmax(-1).amax(-1, keepdim=True) - even) / (1 - even)
    return low + (high - low) * confidence


def forward_kl(
    student_PV: torch.Tensor, teacher_PV: torch.Tensor, temperature: Temperature, skew: float
) -> torch.Tensor:
    """KL(teacher || student)."""
    return tempered_kl(student_PV, teacher_PV, temperature).mean()


def reverse_kl(
    student_PV: torch.Tensor, teacher_PV: torch.Tensor, temperature: Temperature, skew: float
) -> torch.Tensor:
    """KL(student || teacher) (Gu et al. 2024, MiniLLM)."""
    return tempered_kl(teacher_PV, student_PV, temperature).mean()


def jensen_shannon(
    student_PV: torch.Tensor, teacher_PV: torch.Tensor, temperature: Temperature, skew: float
) -> torch.Tensor:
    """(KL(teacher || m) + KL(student || m)) / 2 with m their mean (Agarwal et al. 2024, GKD)."""
    student, teacher, mixture = _with_mixture(student_PV, teacher_PV, temperature, 0.5)
    loss = (_kl(teacher, mixture) + _kl(student, mixture)) / 2
    return (temperature**2 * loss).mean()


def skewed_kl(
    student_PV: torch.Tensor, teacher_PV: torch.Tensor, temperature: Temperature, skew: float
) -> torch.Tensor:
    """KL(teacher || skew teacher + (1 - skew) student) (Ko et al. 2024, DistiLLM)."""
    _, teacher, mixture = _with_mixture(student_PV, teacher_PV, temperature, skew)
    return (temperature**2 * _kl(teacher, mixture)).mean()


def _with_mixture(
    student_PV: torch.Tensor, teacher_PV: torch.Tensor, temperature: Temperature, share: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities [P, V] of student, teacher, and share teacher + (1 - share) student."""
    student, teacher = log_softmax(student_PV / temperature, -1), log_softmax(teacher_PV / temperature, -1)
    return student, teacher, torch.logaddexp(teacher + _log(share), student + _log(1 - share))


def _kl(log_p_PV: torch.Tensor, log_q_PV: torch.Tensor) -> torch.Tensor:
    """KL(p || q) [P, 1]."""
    return kl_div(log_q_PV, log_p_PV, log_target=True, reduction="none").sum(-1, True)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


# Of student from teacher on dense targets, times T^2, in nats, mean over positions. Arguments are logits
# [P, V] of both, the temperature (one number, or one a position [P, 1]), and the skew.
Divergence = Callable[[torch.Tensor, torch.Tensor, Temperature, float], torch.Tensor]
DIVERGENCES: dict[str, Divergence] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jensen_shannon,
    "skewed": skewed_kl,
}


def distillation_loss(
    student_PV: torch.Tensor,
    teacher_PV: torch.Tensor,
    temperature: Temperature = 1.0,
    divergence: str = "forward",
    skew: float = 0.1,
) -> torch.Tensor:
    """The divergence of this name: see `DIVERGENCES`."""
    return DIVERGENCES[divergence](student_PV, teacher_PV, temperature, skew)
