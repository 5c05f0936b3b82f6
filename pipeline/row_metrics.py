"""What students of several labels, of numbers and of vectors are worth, and how near they are to a teacher.

Shape letters: N rows, C labels (or numbers), W width of a vector.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float32]
Values = dict[str, float | None]

NEIGHBOURS = 10
ROWS_AT_ONCE = 1024  # of similarities in memory


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


def value_quality(said_NC: Numbers, truth_NC: Numbers) -> Values:
    """RMSE, mean absolute error, R^2, Pearson's and Spearman's correlation; each the mean over the numbers.

    R^2 and correlations are None where a column is constant.
    """
    return {
        "rmse": _rmse(said_NC, truth_NC),
        "mae": float(np.abs(said_NC - truth_NC).mean()),
        "r2": _mean_of(r_squared, said_NC, truth_NC),
        "pearson": _mean_of(_correlation, said_NC, truth_NC),
        "spearman": _mean_of(_correlation, _ranks(said_NC), _ranks(truth_NC)),
    }


def value_agreement(said_NC: Numbers, teacher_NC: Numbers, truth_NC: Numbers) -> Values:
    """RMSE to the teacher's numbers, mean over them."""
    return {"rmse_to_teacher": _rmse(said_NC, teacher_NC)}


def no_quality(said_NW: Numbers, truth: object) -> Values:
    """Vectors have no labels to be right about."""
    return {}


def vector_agreement(said_NW: Numbers, teacher_NW: Numbers, truth: object) -> Values:
    """Mean cosine to the teacher's vectors; share of rows whose nearest other row (by cosine) is the same as
    for the teacher; mean share of its nearest ten (or of all others) that are the teacher's.
    """
    said, wanted = _unit(said_NW), _unit(teacher_NW)
    near, of_teacher = _nearest(said), _nearest(wanted)
    common = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(near, of_teacher, strict=True)]
    return {
        "cosine": float((said * wanted).sum(1).mean()),
        "nearest": float((near[:, 0] == of_teacher[:, 0]).mean()),
        "nearest_10": float(np.mean(common)),
    }


def r_squared(said_N: npt.NDArray[Any], truth_N: npt.NDArray[Any]) -> float | None:
    """1 - squared error / variance; None where the truth is constant."""
    spread = float(((truth_N - truth_N.mean()) ** 2).sum())
    return 1 - float(((said_N - truth_N) ** 2).sum()) / spread if spread > 0 else None


def _rmse(said_NC: Numbers, truth_NC: Numbers) -> float:
    return float(np.sqrt(((said_NC - truth_NC).astype(np.float64) ** 2).mean(0)).mean())


def _mean_of(metric: Any, said_NC: npt.NDArray[Any], truth_NC: npt.NDArray[Any]) -> float | None:
    pairs = zip(said_NC.astype(np.float64).T, truth_NC.astype(np.float64).T, strict=True)
    found = [metric(said, truth) for said, truth in pairs]
    return None if None in found else float(np.mean(found))


def _correlation(said_N: npt.NDArray[Any], truth_N: npt.NDArray[Any]) -> float | None:
    if said_N.std() == 0 or truth_N.std() == 0:
        return None
    return float(np.corrcoef(said_N, truth_N)[0, 1])


def _ranks(values_NC: Numbers) -> npt.NDArray[np.float64]:
    """The rank of each number in its column; equal ones share the mean of their ranks."""
    ranks = np.empty(values_NC.shape)
    for column in range(values_NC.shape[1]):
        _, places, counts = np.unique(values_NC[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _unit(vectors_NW: Numbers) -> Numbers:
    lengths = np.linalg.norm(vectors_NW, axis=1, keepdims=True)
    made: Numbers = vectors_NW / np.maximum(lengths, 1e-12)
    return made


def _nearest(unit_NW: Numbers) -> npt.NDArray[np.int64]:
    """The nearest other rows of each row, nearest first (ties: the earlier row): [N, 10], or all others."""
    found = []
    for start in range(0, len(unit_NW), ROWS_AT_ONCE):
        part = unit_NW[start : start + ROWS_AT_ONCE]
        similar = part @ unit_NW.T
        similar[np.arange(len(part)), np.arange(start, start + len(part))] = -np.inf  # not itself
        found.append(np.argsort(-similar, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(unit_NW) - 1)])
    return np.concatenate(found)


def _sigmoid(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    made: npt.NDArray[np.float64] = np.exp(_log_sigmoid(values))
    return made


def _log_sigmoid(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    made: npt.NDArray[np.float64] = -np.logaddexp(0, -values)
    return made
