"""Regression: squared errors, and metrics of numbers.

Shape letters: N rows, B batch, C numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import mse_loss

from pipeline.objectives.base import Numbers, Objective, SoftLossSettings, Validation, Values, over_labelled

Metric = Callable[[npt.NDArray[Any], npt.NDArray[Any]], float | None]


def label_loss(student_BC: torch.Tensor, labels_BC: torch.Tensor) -> torch.Tensor:
    """Mean squared error; 0, with a gradient of 0, where no row has numbers."""
    return over_labelled(mse_loss, student_BC, labels_BC)


def soft_loss(student_BC: torch.Tensor, teacher_BC: torch.Tensor, settings: SoftLossSettings) -> torch.Tensor:
    """Mean squared error to the teacher's numbers."""
    return mse_loss(student_BC, teacher_BC)


def validate(student_NC: torch.Tensor, labels_NC: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    """Score: R^2, 0 where a column is constant."""
    r2 = value_quality(student_NC.numpy(), labels_NC.numpy())["r2"] or 0.0
    return Validation(r2, label_loss(student_NC, labels_NC).item())


def value_quality(student_NC: Numbers, labels_NC: Numbers) -> Values:
    """RMSE, mean absolute error, R^2, Pearson's and Spearman's correlation; each the mean over the numbers.

    R^2 and correlations are None where a column is constant.
    """
    return {
        "rmse": _rmse(student_NC, labels_NC),
        "mae": float(np.abs(student_NC - labels_NC).mean()),
        "r2": _mean_of(r_squared, student_NC, labels_NC),
        "pearson": _mean_of(_correlation, student_NC, labels_NC),
        "spearman": _mean_of(_correlation, _ranks(student_NC), _ranks(labels_NC)),
    }


def value_agreement(student_NC: Numbers, teacher_NC: Numbers, labels_NC: Numbers) -> Values:
    """RMSE to the teacher's numbers, mean over them."""
    return {"rmse_to_teacher": _rmse(student_NC, teacher_NC)}


def r_squared(student_N: npt.NDArray[Any], labels_N: npt.NDArray[Any]) -> float | None:
    """1 - squared error / variance; None where the labels are constant."""
    spread = float(((labels_N - labels_N.mean()) ** 2).sum())
    return 1 - float(((student_N - labels_N) ** 2).sum()) / spread if spread > 0 else None


def _rmse(student_NC: Numbers, labels_NC: Numbers) -> float:
    return float(np.sqrt(((student_NC - labels_NC).astype(np.float64) ** 2).mean(0)).mean())


def _mean_of(metric: Metric, student_NC: npt.NDArray[Any], labels_NC: npt.NDArray[Any]) -> float | None:
    pairs = zip(student_NC.astype(np.float64).T, labels_NC.astype(np.float64).T, strict=True)
    values = [metric(student_N, labels_N) for student_N, labels_N in pairs]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _correlation(student_N: npt.NDArray[Any], labels_N: npt.NDArray[Any]) -> float | None:
    if student_N.std() == 0 or labels_N.std() == 0:
        return None
    return float(np.corrcoef(student_N, labels_N)[0, 1])


def _ranks(values_NC: Numbers) -> npt.NDArray[np.float64]:
    """The rank of each number in its column; equal ones share the mean of their ranks."""
    ranks = np.empty(values_NC.shape)
    for column in range(values_NC.shape[1]):
        _, places, counts = np.unique(values_NC[:, column], return_inverse=True, return_counts=True)
        ranks[:, column] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


REGRESSION = Objective(label_loss, soft_loss, ("mse",), validate, True, value_quality, value_agreement)
