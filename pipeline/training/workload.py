"""What a student is trained with: batches, loss and validation of one task, as the training loop takes them.

rows_workload.py makes one of a cache with a target a row, documents_workload.py one of a language model's.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import torch

from pipeline.config.recipes import Recipe
from pipeline.data.inputs import Reader
from pipeline.data.rows import POOL, VIEWS, Rows
from pipeline.objectives.base import Validation
from pipeline.training.loop import TrainingFunctions
from storage import Cache


class TrainingData(NamedTuple):
    """What a student learns from: a cache, the rows that it has targets of, and what reads them."""

    cache: Cache
    rows: Rows
    reader: Reader


class Workload(NamedTuple):
    """The training of one task, or of several."""

    num_outputs: int  # classes, or ids of the vocabulary
    num_targets: int  # of an epoch, for the progress bar
    steps: int  # of all epochs
    batches: Callable[..., Generator[Any, None, None]]  # see TrainingFunctions
    loss: Callable[[torch.nn.Module, Any, float], torch.Tensor]
    validate: Callable[[torch.nn.Module], Validation]
    by_loss: bool  # see training/selection.py
    cut_rows: int  # rows that lost tokens to the student's maximum
    padding: tuple[float, float] | None  # share of padding, with and without rows sorted by length
    rows_per_item: float  # of what a batch has: whole rows, or pieces of longer ones
    # Adds what is trained with the student and not saved: the projections of feature matching.
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model

    @property
    def functions(self) -> TrainingFunctions:
        """What the training loop takes."""
        return TrainingFunctions(self.batches, self.loss, self.validate)


def training_splits(recipe: Recipe) -> tuple[str, ...]:
    """The splits that a recipe trains on."""
    if recipe.pool == "only":
        return (POOL,)
    return ("train", *((POOL,) if recipe.pool else ()), *((VIEWS,) if recipe.views else ()))
