"""The objective of each task."""

from pipeline.config.tasks import TASKS
from pipeline.objectives.base import Objective, mixed_loss
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.objectives.embedding import (
    no_label_loss,
    no_quality,
    validate_vectors,
    vector_agreement,
    vector_distance,
)
from pipeline.objectives.multilabel import (
    binary_kl,
    label_agreement,
    label_quality,
    multilabel_loss,
    validate_labels,
)
from pipeline.objectives.regression import (
    squared_error,
    validate_values,
    value_agreement,
    value_loss,
    value_quality,
)
from storage.tasks import Task


def objective_of(task: Task) -> Objective:
    """The objective of a task with one target a row, or one a word."""
    return OBJECTIVES[TASKS[task].objective]


OBJECTIVES: dict[str, Objective] = {
    "classification": CLASSIFICATION,
    "multilabel": Objective(
        multilabel_loss, mixed_loss(multilabel_loss, binary_kl),
        validate_labels, False, label_quality, label_agreement,
    ),
    "regression": Objective(
        squared_error, mixed_loss(squared_error, value_loss),
        validate_values, True, value_quality, value_agreement,
    ),
    "embedding": Objective(
        no_label_loss, mixed_loss(no_label_loss, vector_distance),
        validate_vectors, True, no_quality, vector_agreement,
    ),
}  # fmt: skip
