"""The objective of each task: `TaskSpec.objective` names an entry of `OBJECTIVES`.

Language models have none here: their targets belong to positions, and objectives/language_model.py has what
they are measured by.
"""

from pipeline.config.tasks import TASKS
from pipeline.objectives.base import Objective
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.objectives.embedding import EMBEDDING
from pipeline.objectives.multilabel import MULTILABEL
from pipeline.objectives.regression import REGRESSION
from storage.tasks import Task

OBJECTIVES = {
    "classification": CLASSIFICATION,
    "multilabel": MULTILABEL,
    "regression": REGRESSION,
    "embedding": EMBEDDING,
}


def objective_of(task: Task) -> Objective:
    """The objective of a task that has one target a row, or one a word."""
    return OBJECTIVES[TASKS[task].objective]
