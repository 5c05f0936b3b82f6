"""What an objective is: label loss, soft loss, validation, quality, agreement with the teacher.

Shape letters: N rows, B batch, P positions, C classes, labels or numbers.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.losses.divergences import MixedTargets
from pipeline.losses.sparse import SparseTargets

Numbers = npt.NDArray[np.float32]
Values = Mapping[str, float | None]

Targets = torch.Tensor | SparseTargets | MixedTargets  # of one batch: dense, entries, or of several teachers
LabelLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of student outputs and labels


class SoftLossSettings(NamedTuple):
    """How a student's outputs are compared with its teacher's targets."""

    temperature: float | torch.Tensor = 1.0  # one number, or one a position [P, 1]
    divergence: str = "forward"  # a name that the objective has
    skew: float = 0.1  # of the skewed divergence: the teacher's share of the mixture
    sampled: bool = False  # whether entries are random draws from the teacher's distribution


SoftLoss = Callable[[torch.Tensor, Any, SoftLossSettings], torch.Tensor]  # of student outputs and Targets


class Validation(NamedTuple):
    """One evaluation on the validation split."""

    score: float  # what it measures depends on the objective; higher is better
    loss: float  # to the labels; of embeddings to the teacher's vectors


# Of student outputs, labels and, where a student is trained, its teacher's outputs on the validation split.
Validate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Validation]


class Objective(NamedTuple):
    """What the students of a task minimise and are measured by. Labels are those of `Rows.truth`."""

    label_loss: LabelLoss
    soft_loss: SoftLoss
    divergences: Collection[str]  # names that the soft loss knows
    validate: Validate
    by_loss: bool  # whether the best state is that of the lowest loss, not of the highest score
    quality: Callable[[Any, Any], Values]  # of student outputs and labels
    agreement: Callable[[Any, Any, Any], Values]  # of student outputs, the teacher's, and labels

    def mixed_loss(
        self,
        student: torch.Tensor,
        labels: torch.Tensor,
        targets: Targets,
        alpha: float,
        settings: SoftLossSettings = SoftLossSettings(),  # noqa: B008 (immutable)
    ) -> torch.Tensor:
        """alpha label loss + (1 - alpha) soft loss."""
        return mix(
            alpha,
            lambda: self.label_loss(student, labels),
            lambda: self.soft_loss(student, targets, settings),
        )


def mix(
    alpha: float,
    label_loss: Callable[[], torch.Tensor],
    soft_loss: Callable[[], torch.Tensor],
    label_share: float = 1.0,
    soft_share: float = 1.0,
) -> torch.Tensor:
    """alpha label loss + (1 - alpha) soft loss. A part with weight 0 is not computed.

    The shares are those of a part of a batch: labels are a mean over labelled rows, targets over all rows.
    """
    if alpha == 1:
        return label_share * label_loss()
    soft = soft_share * (1 - alpha) * soft_loss()
    return soft if alpha == 0 else label_share * alpha * label_loss() + soft


def mix_part(
    alpha: float,
    label_loss: Callable[[], torch.Tensor],
    soft_loss: Callable[[], torch.Tensor],
    shares: tuple[float, float] | None,
) -> torch.Tensor:
    """`mix` of one rank's part of a batch. `shares`: what its means over targets and over labels count among
    those of all ranks (DistillBatch.shares); None: it is the whole batch.
    """
    if shares is None:
        return mix(alpha, label_loss, soft_loss)
    soft_share, label_share = shares
    if soft_share == label_share:
        return soft_share * mix(alpha, label_loss, soft_loss)
    return mix(alpha, label_loss, soft_loss, label_share, soft_share)


def over_labelled(loss: LabelLoss, student_BC: torch.Tensor, labels_BC: torch.Tensor) -> torch.Tensor:
    """A loss over the rows that have labels; 0, with a gradient of 0, where no row has."""
    labelled_B = ~labels_BC.isnan().any(-1)
    if not labelled_B.any():
        return 0 * student_BC.sum()
    return loss(student_BC[labelled_B], labels_BC[labelled_B])


ECE_BINS = 15


def binned_error(confidence_N: npt.NDArray[np.floating[Any]], right_N: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence|, weighted, over 15 bins.

    Of the confidence in each first choice, and whether it is right.
    """
    bin_N = np.minimum((confidence_N * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [abs(float((right_N[bin_N == b] - confidence_N[bin_N == b]).sum())) for b in range(ECE_BINS)]
    return sum(gaps) / len(right_N)
