"""Objectives, divergences and the schema know the same names; the parts of a loss are mixed in one way."""

from typing import get_args

import pytest
import torch

from pipeline.config.recipes import Recipe
from pipeline.config.tasks import CLASS_DIVERGENCES, TASKS, ObjectiveName
from pipeline.losses.divergences import DIVERGENCES
from pipeline.objectives.base import mix
from pipeline.objectives.registry import OBJECTIVES


def test_every_divergence_of_classes_is_in_the_schema_and_every_name_of_the_schema_is_known() -> None:
    assert tuple(DIVERGENCES) == CLASS_DIVERGENCES
    schema = set(get_args(Recipe.model_fields["divergence"].annotation))
    assert schema == {name for objective in OBJECTIVES.values() for name in objective.divergences}


def test_every_objective_of_the_table_of_tasks_has_an_entry() -> None:
    assert set(OBJECTIVES) == set(get_args(ObjectiveName)) - {"language_model"}


@pytest.mark.parametrize("task", [t for t in TASKS if TASKS[t].objective in OBJECTIVES])
def test_a_task_has_the_divergences_of_its_objective(task: str) -> None:
    assert set(TASKS[task].divergences) == set(OBJECTIVES[TASKS[task].objective].divergences)


def test_a_part_with_weight_zero_is_not_computed_and_shares_weigh_the_parts() -> None:
    def never() -> torch.Tensor:
        raise AssertionError

    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert mix(1.0, lambda: one, never) == 1
    assert mix(0.0, never, lambda: two) == 2
    assert mix(0.25, lambda: one, lambda: two) == 0.25 + 1.5
    assert mix(0.25, lambda: one, lambda: two, label_share=2.0, soft_share=0.5) == 0.5 + 0.75
