"""One class a row: cross-entropy, the recipe mix, quality, calibration, agreement.

Shape letters: N rows, P positions, V or C classes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from pipeline.data.rows import NO_LABEL
from pipeline.losses.divergences import Divergence, MixedTargets, distillation_loss
from pipeline.losses.sparse import SparseTargets, bucket_kl, sampled_kl
from pipeline.objectives.base import Objective, Validation, binned_error

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


def class_quality(logits_NC: Logits, labels_N: Labels) -> dict[str, float | None]:
    """Accuracy, ROC AUC (one against the rest, macro; None where a class is absent), macro F1, ECE. All in
    [0, 1].
    """
    from sklearn.metrics import (
        accuracy_score,
        f1_score,
        roc_auc_score,
    )  # a second to import; few stages need it

    probability_NC = np.exp(_log_softmax(logits_NC))
    said_N = logits_NC.argmax(1)
    classes = np.arange(logits_NC.shape[1])
    auc = None
    if set(labels_N) == set(classes):
        scores = probability_NC[:, 1] if len(classes) == 2 else probability_NC
        auc = float(roc_auc_score(labels_N, scores, multi_class="ovr", labels=classes))
    return {
        "accuracy": float(accuracy_score(labels_N, said_N)),
        "roc_auc": auc,
        "macro_f1": float(f1_score(labels_N, said_N, average="macro", labels=classes, zero_division=0)),
        "ece": calibration_error(probability_NC, labels_N),
    }


def calibration_error(probability_NC: npt.NDArray[np.floating[Any]], labels_N: Labels) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence| over 15 bins of confidence."""
    return binned_error(probability_NC.max(1), probability_NC.argmax(1) == labels_N)


def class_agreement(logits_NC: Logits, teacher_NC: Logits, labels_N: Labels) -> dict[str, float]:
    """Agreement of classes, KL(teacher || student) in nats, and who is right where, as shares."""
    student, teacher = _log_softmax(logits_NC), _log_softmax(teacher_NC)
    right, teacher_right = logits_NC.argmax(1) == labels_N, teacher_NC.argmax(1) == labels_N
    return {
        "agreement": float((logits_NC.argmax(1) == teacher_NC.argmax(1)).mean()),
        "kl_to_teacher": float((np.exp(teacher) * (teacher - student)).sum(1).mean()),
        "both_right": float((right & teacher_right).mean()),
        "only_teacher_right": float((~right & teacher_right).mean()),
        "only_student_right": float((right & ~teacher_right).mean()),
        "both_wrong": float((~right & ~teacher_right).mean()),
    }


def _log_softmax(logits_NC: Logits) -> npt.NDArray[np.float64]:
    wide: npt.NDArray[np.float64] = logits_NC.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def label_loss(logits_PV: torch.Tensor, labels_P: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, mean over labelled positions; 0, with a gradient of 0, where none has one."""
    total = cross_entropy(logits_PV, labels_P, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels_P != NO_LABEL).sum().clamp(min=1)


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


def _validate_classes(said: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    right = (said.argmax(1) == labels).float().mean().item()
    return Validation(right, label_loss(said, labels).item())


CLASSIFICATION = Objective(label_loss, recipe_loss, _validate_classes, False, class_quality, class_agreement)
