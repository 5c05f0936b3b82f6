"""The state of a training between steps: counters, the learning curve, and the best weights so far."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, Self, TypeVar

import torch

from pipeline.objectives.base import Validation
from pipeline.training import checkpoints
from pipeline.training.selection import rank
from storage.errors import TrainingError

SAVED_NUMBERS = (  # of TrainingProgress, besides tensors
    "steps", "rows", "targets", "since_best", "best_step", "epoch", "batch", "training_seconds",
    "waiting_seconds", "seconds", "curve",
)  # fmt: skip


class AnyBatch(Protocol):
    """What a step learns from: a DistillBatch, or one of each of several tasks."""

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""

    @property
    def num_rows(self) -> int:
        """Rows, or pieces of long ones."""

    @property
    def num_targets(self) -> int:
        """Targets, which the progress bar counts."""


Batch = TypeVar("Batch", bound=AnyBatch)


class TrainingProgress:
    """Steps, rows, targets and seconds so far, the learning curve, and the best state."""

    def __init__(self, by_loss: bool) -> None:
        self.steps = self.rows = self.targets = self.since_best = self.best_step = 0
        self.epoch = self.batch = 0  # place of the next batch: with the seed, the whole state of the stream
        self.training_seconds = self.waiting_seconds = self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.best_state: dict[str, Any] = {}
        self.best = Validation(-1.0, math.inf)
        self._losses: list[float] = []
        self._by_loss = by_loss
        self._validation_seconds = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; counts the time of the steps, and the time in which they wait for batches."""
        started = time.perf_counter()
        for batch in batches:
            ready = time.perf_counter()
            self.waiting_seconds += ready - started
            self._validation_seconds = 0.0
            yield batch
            self.training_seconds += time.perf_counter() - started - self._validation_seconds
            started = time.perf_counter()

    def count_step(self, batch: AnyBatch, loss: float) -> None:
        """Count a step on this batch. Raises TrainingError where its loss is not finite."""
        self.steps += 1
        self.batch += 1
        self.rows += batch.num_rows
        self.targets += batch.num_targets
        self._losses.append(loss)
        _check_finite("training", loss, self.steps)

    def evaluate(
        self, model: torch.nn.Module, validate: Callable[[torch.nn.Module], Validation], epoch: float
    ) -> None:
        """Validate the model, add a point to the curve, and keep its state where it is the best.

        Raises TrainingError where the validation loss is not finite.
        """
        started = time.perf_counter()
        model.eval()
        found = validate(model)
        _check_finite("validation", found.loss, self.steps)
        self.curve.append(
            {
                "step": self.steps,
                "epoch": round(epoch, 3),
                "rows": self.rows,
                "train_loss": sum(self._losses) / len(self._losses),
                "validation_accuracy": found.score,
                "validation_loss": found.loss,
            }
        )
        self._losses = []
        self.since_best += 1
        if self._rank(found) > self._rank(self.best):
            self.best, self.best_step, self.since_best = found, self.steps, 0
            self.best_state = copy.deepcopy(model.state_dict())
        self._validation_seconds += time.perf_counter() - started

    def numbers(self) -> dict[str, Any]:
        """Everything except tensors, as JSON has it."""
        own = {name: getattr(self, name) for name in SAVED_NUMBERS}
        return own | {"best": list(self.best), "losses": self._losses}

    def restore(self, kept: checkpoints.Checkpoint, device: torch.device) -> None:
        """Be the progress that a checkpoint has."""
        for name in SAVED_NUMBERS:
            setattr(self, name, kept.numbers[name])
        self.best, self._losses = Validation(*kept.numbers["best"]), kept.numbers["losses"]
        best = checkpoints.without_prefix("best.", kept.tensors)
        self.best_state = {name: tensor.to(device) for name, tensor in best.items()}

    def _rank(self, found: Validation) -> tuple[float, float]:
        return rank(found.score, found.loss, self._by_loss)


def _check_finite(which: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the {which} loss is {loss} at step {step}.\nLower learning_rate, or raise warmup."
        )
