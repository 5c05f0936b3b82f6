"""Losses: pure functions of tensors, in nats, averaged over the rows of a batch.

    loss = alpha CE + (1 - alpha) T^2 KL(teacher_T || student_T)

CE counts labelled rows only and divides by their number; KL counts every row and divides by the number of
rows, never by the number of classes. The factor T^2 (Hinton et al. 2015, section 2) is applied here and
nowhere else: it keeps the size of the soft gradient independent of T. Shape letters: B batch, C classes.
"""

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from pipeline.data import NO_LABEL


def label_loss(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, mean over labelled rows; 0 (with a gradient of 0) where no row has a label."""
    total = cross_entropy(logits_BC, labels_B, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels_B != NO_LABEL).sum().clamp(min=1)


def distillation_loss(student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) in nats, mean over rows. Arguments are logits."""
    student = log_softmax(student_BC / temperature, dim=-1)
    teacher = log_softmax(teacher_BC / temperature, dim=-1)
    return temperature**2 * kl_div(student, teacher, log_target=True, reduction="batchmean")


def recipe_loss(
    student_BC: torch.Tensor,
    labels_B: torch.Tensor,
    teacher_BC: torch.Tensor,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """alpha CE + (1 - alpha) T^2 KL. A part with weight 0 is not computed."""
    if alpha == 1:
        return label_loss(student_BC, labels_B)
    soft = (1 - alpha) * distillation_loss(student_BC, teacher_BC, temperature)
    return soft if alpha == 0 else alpha * label_loss(student_BC, labels_B) + soft
