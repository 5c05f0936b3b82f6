"""Regression: squared errors, and metrics of numbers.

Shape letters: N rows, B batch, C numbers.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import mse_loss

from pipeline.objectives.base import Numbers, Validation, Values, over_labelled


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


def squared_error(said_BC: torch.Tensor, truth_BC: torch.Tensor) -> torch.Tensor:
    """Mean squared error; 0, with a gradient of 0, where no row has numbers."""
    return over_labelled(mse_loss, said_BC, truth_BC)


def value_loss(
    said_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0, divergence: str = "mse"
) -> torch.Tensor:
    """Mean squared error to the teacher's numbers."""
    return mse_loss(said_BC, teacher_BC)


def validate_values(said: torch.Tensor, truth: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    """Validation by R^2."""
    known = value_quality(said.numpy(), truth.numpy())["r2"]
    return Validation(known or 0.0, squared_error(said, truth).item())
