"""Training in several processes at once, each on its part of every batch: what torchrun starts.

    torchrun --nproc-per-node 2 -m stages.train RUN

Every process reads the same cache and the same params.yaml, and knows its place from torchrun's environment.
The gradients of a step are those of one process with the whole batch, up to rounding; units that dropout
takes away are others.
"""

import os
from typing import TYPE_CHECKING

from pipeline import config_recipes, hardware
from storage.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.runs import Job
    from pipeline.seeds import Trained


def refuse_misfit(name: str, recipe: config_recipes.Recipe, num_ranks: int) -> None:
    """Raise ConfigError where a recipe's loss is no sum over rows, so that parts of a batch have none."""
    if recipe.match:
        raise ConfigError(
            f"runs.{name}: its recipe matches inner states, found {num_ranks} processes, expected one.\n"
            f"Train it in one: python -m stages.train {name}"
        )


def one_by_one(jobs: "list[Job]") -> "list[Trained]":
    """Train the jobs in this process, together with its companions: all of them have the same jobs."""
    from pipeline.seeds import train_seed  # torch

    threads = max(1, hardware.num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return [train_seed(job._replace(threads=threads)) for job in jobs]
