"""The best state, seed and candidate are chosen by one rule: the score, or the loss where the loss rules."""

import math
from typing import Any

import pytest
import torch

from pipeline.objectives.base import Validation
from pipeline.training.cross_validation import FoldScores, best_candidate
from pipeline.training.progress import TrainingProgress
from pipeline.training.selection import best_seed, judged_by


def record(by_loss: bool, *seeds: tuple[int, float, float]) -> dict[str, Any]:
    own = [{"seed": s, "best_accuracy": score, "best_loss": loss} for s, score, loss in seeds]
    return {"judged_by": judged_by(by_loss), "seeds": own}


SEEDS = (3, 0.8, 0.1), (4, 0.9, 0.6), (5, 0.9, 0.4), (6, 0.9, 0.4)


def test_the_best_seed_is_that_of_the_highest_accuracy_then_of_the_lowest_loss() -> None:
    made = record(False, *SEEDS)
    assert best_seed(made) == 5
    del made["judged_by"]  # as before there was the key
    assert best_seed(made) == 5


def test_the_best_seed_is_that_of_the_lowest_loss_where_the_loss_chose_the_states() -> None:
    assert best_seed(record(True, *SEEDS)) == 3
    assert best_seed(record(True, (0, 0.1, 0.2), (1, 0.3, 0.2))) == 1


@pytest.mark.parametrize("by_loss", [False, True])
def test_states_seeds_and_candidates_are_ranked_alike(by_loss: bool) -> None:
    looks = [(0.5, 0.3), (0.7, 0.4), (0.7, 0.2), (0.6, 0.1), (0.7, 0.2), (0.4, 0.1)]
    candidates = [FoldScores([score], [loss]) for score, loss in looks]
    seeds = record(by_loss, *((n, *look) for n, look in enumerate(looks)))
    state, model = TrainingProgress(by_loss), torch.nn.Linear(1, 1)
    for state.steps, look in enumerate(looks):
        state._losses = [math.pi]
        state.evaluate(model, lambda _, look=look: Validation(*look), epoch=0.0)  # type: ignore[misc]
    assert best_candidate(candidates, by_loss) == best_seed(seeds) == state.best_step == (3 if by_loss else 2)
