"""Several labels a row: binary cross-entropy and KL, F1.

Shape letters: N rows, B batch, C labels.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from pipeline.objectives.base import Numbers, Validation, Values, over_labelled


def label_quality(logits_NC: Numbers, truth_NC: Numbers) -> Values:
    """Of several labels a row, each said where its probability is 1/2 or more.

    Macro and micro F1, ROC AUC (mean over labels that some rows have and some have not; None for none), share
    of rows with all labels right. All in [0, 1].
    """
    from sklearn.metrics import f1_score, roc_auc_score  # as in metrics.py

    said, true = logits_NC >= 0, truth_NC > 0.5
    told = [c for c in range(true.shape[1]) if 0 < true[:, c].sum() < len(true)]
    aucs = [roc_auc_score(true[:, c], logits_NC[:, c]) for c in told]
    return {
        "macro_f1": float(f1_score(true, said, average="macro", zero_division=0)),
        "micro_f1": float(f1_score(true, said, average="micro", zero_division=0)),
        "roc_auc": float(np.mean(aucs)) if aucs else None,
        "exact_match": float((said == true).all(1).mean()),
    }


def label_agreement(logits_NC: Numbers, teacher_NC: Numbers, truth_NC: Numbers) -> Values:
    """Share of labels that student and teacher both say or both do not; KL of the teacher's probabilities in
    nats, mean over rows and labels.
    """
    said, wanted = logits_NC.astype(np.float64), teacher_NC.astype(np.float64)
    p, log_yes, log_no = _sigmoid(wanted), _log_sigmoid(wanted), _log_sigmoid(-wanted)
    kl = p * (log_yes - _log_sigmoid(said)) + (1 - p) * (log_no - _log_sigmoid(-said))
    return {
        "agreement": float(((logits_NC >= 0) == (teacher_NC >= 0)).mean()),
        "kl_to_teacher": float(kl.mean()),
    }


def _sigmoid(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    made: npt.NDArray[np.float64] = np.exp(_log_sigmoid(values))
    return made


def _log_sigmoid(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    made: npt.NDArray[np.float64] = -np.logaddexp(0, -values)
    return made


def multilabel_loss(said_BC: torch.Tensor, truth_BC: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each label's sigmoid in nats; 0, with a gradient of 0, where no row has any."""
    return over_labelled(binary_cross_entropy_with_logits, said_BC, truth_BC)


def binary_kl(
    said_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0, divergence: str = "forward"
) -> torch.Tensor:
    """T^2 KL(Bern(sigmoid(teacher / T)) || Bern(sigmoid(student / T))) in nats, mean over rows and labels.

    T^2 is that of Hinton et al. 2015 (section 2); each label is a classifier of two classes.
    """
    said, wanted = said_BC / temperature, teacher_BC / temperature
    kl = wanted.sigmoid() * (logsigmoid(wanted) - logsigmoid(said))
    kl = kl + (-wanted).sigmoid() * (logsigmoid(-wanted) - logsigmoid(-said))
    return temperature**2 * kl.mean()


def validate_labels(said: torch.Tensor, truth: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    """Validation by macro F1."""
    found = label_quality(said.numpy(), truth.numpy())["macro_f1"] or 0.0
    return Validation(found, multilabel_loss(said, truth).item())
