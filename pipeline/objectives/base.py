"""What an objective is: label loss, soft loss, validation, quality, agreement with the teacher.

Shape letters: N rows, B batch, C classes, labels or numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Numbers = npt.NDArray[np.float32]
Values = dict[str, float | None]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SoftLoss = Callable[[torch.Tensor, torch.Tensor, float, str], torch.Tensor]


def mixed_loss(label_loss: Loss, soft_loss: SoftLoss) -> Callable[..., torch.Tensor]:
    """alpha labels + (1 - alpha) soft, with the arguments of losses.recipe_loss."""

    def loss(
        said_BC: torch.Tensor,
        labels: torch.Tensor,
        teacher_BC: torch.Tensor,
        alpha: float,
        temperature: float,
        divergence: str,
        skew: float = 0.1,
        sampled: bool = False,
    ) -> torch.Tensor:
        if alpha == 1:
            return label_loss(said_BC, labels)
        soft = (1 - alpha) * soft_loss(said_BC, teacher_BC, temperature, divergence)
        return soft if alpha == 0 else alpha * label_loss(said_BC, labels) + soft

    return loss


def over_labelled(loss: Loss, said_BC: torch.Tensor, truth_BC: torch.Tensor) -> torch.Tensor:
    """A loss over the rows that have labels; 0, with a gradient of 0, where none has."""
    there_B = ~truth_BC.isnan().any(-1)
    return loss(said_BC[there_B], truth_BC[there_B]) if there_B.any() else 0 * said_BC.sum()


ECE_BINS = 15


def binned_error(confidence_N: npt.NDArray[np.floating[Any]], right_N: npt.NDArray[np.bool_]) -> float:
    """The same from how sure each first choice was, and whether it was right."""
    bin_N = np.minimum((confidence_N * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [abs(float((right_N[bin_N == b] - confidence_N[bin_N == b]).sum())) for b in range(ECE_BINS)]
    return sum(gaps) / len(right_N)


class Validation(NamedTuple):
    """One look at the validation split."""

    accuracy: float  # share of labels that are the first choice
    loss: float  # cross-entropy to the labels, nats


Validate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Validation]


class Objective(NamedTuple):
    """A task with one target a row. Truths are what batches and `Rows.truth` have."""

    label_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of answers and truths
    loss: Callable[..., torch.Tensor]  # the recipe's, with the arguments of losses.recipe_loss
    look: Validate  # answers, truths and (where there is one) the teacher's answers on validation
    by_loss: bool  # what the best state is chosen by: the loss, or `Validation.accuracy`
    quality: Callable[[Any, Any], Values]  # answers and truths
    against_teacher: Callable[[Any, Any, Any], Mapping[str, float | None]]  # answers, the teacher's, truths
