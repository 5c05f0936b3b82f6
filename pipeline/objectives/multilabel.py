"""Several labels a row: binary cross-entropy and KL, F1.

Shape letters: N rows, B batch, C labels.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pipeline.objectives.base import Numbers, Objective, SoftLossSettings, Validation, Values, over_labelled


def label_loss(student_BC: torch.Tensor, labels_BC: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each label's sigmoid in nats; 0, with a gradient of 0, where no row has any."""
    return over_labelled(binary_cross_entropy_with_logits, student_BC, labels_BC)


def soft_loss(student_BC: torch.Tensor, teacher_BC: torch.Tensor, settings: SoftLossSettings) -> torch.Tensor:
    """`binary_kl` at the temperature of the settings."""
    assert isinstance(settings.temperature, int | float)  # training.checks refuses one a row
    return binary_kl(student_BC, teacher_BC, settings.temperature)


def binary_kl(student_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 KL(Bern(sigmoid(teacher / T)) || Bern(sigmoid(student / T))) in nats, mean over rows and labels.

    T^2 is that of Hinton et al. 2015 (section 2); each label is a classifier of two classes.
    """
    student, teacher = student_BC / temperature, teacher_BC / temperature
    kl = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    kl = kl + (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return temperature**2 * kl.mean()


def validate(student_NC: torch.Tensor, labels_NC: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    """Score: macro F1."""
    macro_f1 = label_quality(student_NC.numpy(), labels_NC.numpy())["macro_f1"] or 0.0
    return Validation(macro_f1, label_loss(student_NC, labels_NC).item())


def label_quality(student_NC: Numbers, labels_NC: Numbers) -> Values:
    """Of several labels a row, each predicted where its probability is 1/2 or more.

    Macro and micro F1, ROC AUC (mean over labels that some rows have and some lack; None without such
    labels), share of rows with all labels right. All in [0, 1].
    """
    from sklearn.metrics import f1_score, roc_auc_score  # a second; few stages need it

    predicted, true = student_NC >= 0, labels_NC > 0.5
    mixed = [c for c in range(true.shape[1]) if 0 < true[:, c].sum() < len(true)]
    aucs = [roc_auc_score(true[:, c], student_NC[:, c]) for c in mixed]
    return {
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
        "micro_f1": float(f1_score(true, predicted, average="micro", zero_division=0)),
        "roc_auc": float(np.mean(aucs)) if aucs else None,
        "exact_match": float((predicted == true).all(1).mean()),
    }


def label_agreement(student_NC: Numbers, teacher_NC: Numbers, labels_NC: Numbers) -> Values:
    """Share of labels that student and teacher both predict or both do not; KL of the teacher's probabilities
    in nats, mean over rows and labels.
    """
    student, teacher = student_NC.astype(np.float64), teacher_NC.astype(np.float64)
    p, log_yes, log_no = _sigmoid(teacher), _log_sigmoid(teacher), _log_sigmoid(-teacher)
    kl = p * (log_yes - _log_sigmoid(student)) + (1 - p) * (log_no - _log_sigmoid(-student))
    return {
        "agreement": float(((student_NC >= 0) == (teacher_NC >= 0)).mean()),
        "kl_to_teacher": float(kl.mean()),
    }


def _sigmoid(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    probabilities: npt.NDArray[np.float64] = np.exp(_log_sigmoid(values))
    return probabilities


def _log_sigmoid(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    logs: npt.NDArray[np.float64] = -np.logaddexp(0, -values)
    return logs


MULTILABEL = Objective(label_loss, soft_loss, ("forward",), validate, False, label_quality, label_agreement)
