"""What is special about each task that has one target a row: its losses, its metrics, its best state.

Everything else, from batches to the report's file, is the same for all of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from pipeline import losses, metrics, row_losses, row_metrics
from pipeline.row_metrics import Values
from pipeline.training import Validation
from storage.spec import Task

Look = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Validation]


class RowTask(NamedTuple):
    """A task with one target a row. Truths are what batches and `Rows.truth` have."""

    label_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of answers and truths
    loss: Callable[..., torch.Tensor]  # the recipe's, with the arguments of losses.recipe_loss
    look: Look  # answers, truths and (where there is one) the teacher's answers on validation
    by_loss: bool  # what the best state is chosen by: the loss, or `Validation.accuracy`
    quality: Callable[[Any, Any], Values]  # answers and truths
    against_teacher: Callable[[Any, Any, Any], Mapping[str, float | None]]  # answers, the teacher's, truths


def of(task: Task) -> RowTask:
    """The one of this task; any classifier's where it is none of its own."""
    return TASKS.get(task, CLASSES)


def _look_at_classes(said: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    right = (said.argmax(1) == labels).float().mean().item()
    return Validation(right, losses.label_loss(said, labels).item())


def _look_at_labels(said: torch.Tensor, truth: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    found = row_metrics.label_quality(said.numpy(), truth.numpy())["macro_f1"] or 0.0
    return Validation(found, row_losses.labels_entropy(said, truth).item())


def _look_at_values(said: torch.Tensor, truth: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    known = row_metrics.value_quality(said.numpy(), truth.numpy())["r2"]
    return Validation(known or 0.0, row_losses.squared_error(said, truth).item())


def _look_at_vectors(said: torch.Tensor, truth: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    assert teacher is not None  # students alone look at vectors
    lost = row_losses.vector_loss(said, teacher).item()
    return Validation(1 - lost, lost)


CLASSES = RowTask(
    losses.label_loss, losses.recipe_loss, _look_at_classes, False, metrics.quality, metrics.against_teacher
)
TASKS: dict[Task, RowTask] = {
    "multi-label-classification": RowTask(
        row_losses.labels_entropy, row_losses.mix(row_losses.labels_entropy, row_losses.binary_kl),
        _look_at_labels, False, row_metrics.label_quality, row_metrics.label_agreement,
    ),
    "regression": RowTask(
        row_losses.squared_error, row_losses.mix(row_losses.squared_error, row_losses.value_loss),
        _look_at_values, True, row_metrics.value_quality, row_metrics.value_agreement,
    ),
    "sentence-embedding": RowTask(
        row_losses.no_labels, row_losses.mix(row_losses.no_labels, row_losses.vector_loss),
        _look_at_vectors, True, row_metrics.no_quality, row_metrics.vector_agreement,
    ),
}  # fmt: skip
