"""The training loop, for students and for teachers that are fine-tuned: small enough to read in one sitting.

`fit` takes batches from a callable and a loss from another, so it knows nothing of caches, recipes or labels.
accelerate places the model on the device and, where asked, runs its forward pass in bfloat16.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from pipeline import hardware
from pipeline.batches import DistillBatch
from storage.errors import TrainingError

MAX_GRADIENT_NORM = 1.0


class Settings(NamedTuple):
    """How long and how fast: AdamW, a linear warm-up, then linear decay to 0."""

    epochs: int
    steps_per_epoch: int
    learning_rate: float
    warmup: float  # share of all steps
    weight_decay: float
    evaluations_per_epoch: int
    patience: int  # evaluations without improvement before it stops
    bfloat16: bool = False  # the forward pass in bfloat16 autocast; weights stay float32


class Validation(NamedTuple):
    """One look at the validation split."""

    accuracy: float
    loss: float  # cross-entropy to the labels, nats


class Fit(NamedTuple):
    """What training did. The model holds its best state afterwards."""

    seconds: float  # of training and validation: core-seconds on a CPU, seconds on a GPU
    steps: int
    rows_seen: int
    best_step: int
    best_accuracy: float  # on validation, of the state that is kept
    stopped: str  # "patience" or "epochs"
    curve: list[dict[str, float]]  # one entry an evaluation


def fit(
    model: torch.nn.Module,
    epoch_batches: Callable[[int], Iterable[DistillBatch]],
    loss: Callable[[torch.Tensor, DistillBatch], torch.Tensor],
    validate: Callable[[torch.nn.Module], Validation],
    settings: Settings,
    advance: Callable[[int], None] = lambda rows: None,
) -> Fit:
    """Train `model` and leave it in its best state by validation accuracy (ties: the lower loss).

    `epoch_batches(epoch)` yields the batches of an epoch; `loss(logits, batch)` is minimised. `advance` is
    told how many rows each step saw. Raises TrainingError where the loss is not finite.
    """
    precision = "bf16" if settings.bfloat16 else "no"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    total = settings.epochs * settings.steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, total, settings.warmup))
    every = -(-settings.steps_per_epoch // settings.evaluations_per_epoch)
    state = _Progress()
    started = hardware.compute_seconds()
    for epoch in range(settings.epochs):
        model.train()
        for batch in epoch_batches(epoch):
            batch = batch.to(accelerator.device)
            value = loss(model(batch.ids_BL, batch.mask_BL), batch)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            state.saw(len(batch.labels_B), float(value.detach()))
            advance(len(batch.labels_B))
            if state.steps % every == 0 or state.steps == total:
                state.look(model, validate, epoch=state.steps / settings.steps_per_epoch)
                model.train()
            if state.since_best >= settings.patience:
                break
        if state.since_best >= settings.patience:
            break
    if not state.curve or state.curve[-1]["step"] != state.steps:
        state.look(model, validate, epoch=state.steps / settings.steps_per_epoch)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast ends with training
    model.load_state_dict(state.best_state)
    model.eval()
    stopped = "patience" if state.since_best >= settings.patience else "epochs"
    seconds = hardware.compute_seconds() - started
    return Fit(seconds, state.steps, state.rows, state.best_step, state.best[0], stopped, state.curve)


class _Progress:
    """Where training stands, and the best state so far."""

    def __init__(self) -> None:
        self.steps = self.rows = self.since_best = self.best_step = 0
        self.curve: list[dict[str, float]] = []
        self.best_state: dict[str, Any] = {}
        self.best = (-1.0, 0.0)
        self._losses: list[float] = []

    def saw(self, rows: int, loss: float) -> None:
        self.steps += 1
        self.rows += rows
        self._losses.append(loss)
        _refuse_nonfinite("training", loss, self.steps)

    def look(
        self, model: torch.nn.Module, validate: Callable[[torch.nn.Module], Validation], epoch: float
    ) -> None:
        model.eval()
        seen = validate(model)
        _refuse_nonfinite("validation", seen.loss, self.steps)
        self.curve.append(
            {
                "step": self.steps,
                "epoch": round(epoch, 3),
                "rows": self.rows,
                "train_loss": sum(self._losses) / len(self._losses),
                "validation_accuracy": seen.accuracy,
                "validation_loss": seen.loss,
            }
        )
        self._losses = []
        self.since_best += 1
        if (seen.accuracy, -seen.loss) > self.best:
            self.best, self.best_step, self.since_best = (seen.accuracy, -seen.loss), self.steps, 0
            self.best_state = copy.deepcopy(model.state_dict())


def _refuse_nonfinite(which: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the {which} loss is {loss} at step {step}.\nLower learning_rate, or raise warmup."
        )


def pace(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor at a step: up over the first `warmup` share, then down to 0."""
    rise = max(1, round(warmup * total))
    return min((step + 1) / rise, max(0.0, (total - step) / max(1, total - rise)))
