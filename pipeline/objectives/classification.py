"""One class a row: cross-entropy, divergences from the teacher, accuracy, calibration, agreement.

Shape letters: N rows, P positions, V or C classes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from pipeline.data.rows import NO_LABEL
from pipeline.losses.divergences import DIVERGENCES, MixedTargets
from pipeline.losses.sparse import bucket_kl, sampled_kl
from pipeline.objectives.base import Objective, SoftLossSettings, Targets, Validation, binned_error

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


def label_loss(student_PV: torch.Tensor, labels_P: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, mean over labelled positions; 0, with a gradient of 0, where no position is."""
    total = cross_entropy(student_PV, labels_P, ignore_index=NO_LABEL, reduction="sum")
    return total / (labels_P != NO_LABEL).sum().clamp(min=1)


def soft_loss(student_PV: torch.Tensor, targets: Targets, settings: SoftLossSettings) -> torch.Tensor:
    """The divergence of the student from the teacher's targets in nats, mean over positions.

    Targets are logits, logits of several teachers, or entries of a sampling codec or of top-k. Entries have
    the forward divergence alone, those of a sampling codec at temperature 1; a temperature a position [P, 1]
    needs logits (training.checks.check_truncated refuses the rest).
    """
    temperature = settings.temperature
    if isinstance(targets, MixedTargets):
        targets = targets.at(temperature)
    if isinstance(targets, torch.Tensor):
        return DIVERGENCES[settings.divergence](student_PV, targets, temperature, settings.skew)
    if settings.sampled:
        return sampled_kl(student_PV, targets)
    assert isinstance(temperature, int | float)
    return bucket_kl(student_PV, targets, temperature)


def pseudo_labels(labels_P: torch.Tensor, teacher_PV: torch.Tensor) -> torch.Tensor:
    """The labels [P], and the teacher's first choice where a position has no label (Lee 2013)."""
    return torch.where(labels_P == NO_LABEL, teacher_PV.argmax(-1), labels_P)


def validate(student_NC: torch.Tensor, labels_N: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    """Score: accuracy."""
    right = (student_NC.argmax(1) == labels_N).float().mean().item()
    return Validation(right, label_loss(student_NC, labels_N).item())


def class_quality(student_NC: Logits, labels_N: Labels) -> dict[str, float | None]:
    """Accuracy, ROC AUC (one against the rest, macro; None where a class is absent), macro F1, ECE. All in
    [0, 1].
    """
    from sklearn.metrics import accuracy_score, f1_score, roc_auc_score  # a second; few stages need it

    probability_NC, choice_N = np.exp(_log_softmax(student_NC)), student_NC.argmax(1)
    classes = np.arange(student_NC.shape[1])
    auc = None
    if set(labels_N) == set(classes):
        scores = probability_NC[:, 1] if len(classes) == 2 else probability_NC
        auc = float(roc_auc_score(labels_N, scores, multi_class="ovr", labels=classes))
    return {
        "accuracy": float(accuracy_score(labels_N, choice_N)),
        "roc_auc": auc,
        "macro_f1": float(f1_score(labels_N, choice_N, average="macro", labels=classes, zero_division=0)),
        "ece": calibration_error(probability_NC, labels_N),
    }


def calibration_error(probability_NC: npt.NDArray[np.floating[Any]], labels_N: Labels) -> float:
    """Expected calibration error of the first choices: see `binned_error`."""
    return binned_error(probability_NC.max(1), probability_NC.argmax(1) == labels_N)


def class_agreement(student_NC: Logits, teacher_NC: Logits, labels_N: Labels) -> dict[str, float]:
    """Agreement of classes, KL(teacher || student) in nats, and which of the two is right, as shares."""
    student, teacher = _log_softmax(student_NC), _log_softmax(teacher_NC)
    right, teacher_right = student_NC.argmax(1) == labels_N, teacher_NC.argmax(1) == labels_N
    return {
        "agreement": float((student_NC.argmax(1) == teacher_NC.argmax(1)).mean()),
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


CLASSIFICATION = Objective(
    label_loss, soft_loss, DIVERGENCES.keys(), validate, False, class_quality, class_agreement
)
