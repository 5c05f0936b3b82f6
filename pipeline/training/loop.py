"""The training loop, for students and for teachers that are fine-tuned: small enough to read in one sitting.

`fit` takes batches from a callable and a loss from another, so it knows nothing of caches, recipes or labels.
accelerate places the model on the device and, where asked, runs its forward pass in bfloat16. Where torchrun
started several processes, it averages their gradients: each trains on its part of every batch.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

import torch

from pipeline.objectives.base import Validation
from pipeline.runtime import hardware
from pipeline.training import checkpoints
from pipeline.training.job import Fit
from pipeline.training.selection import rank
from storage.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


MAX_GRADIENT_NORM = 1.0
SAVED_NUMBERS = (  # of _Progress, beside tensors
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
        """What is counted while it trains."""


Batch = TypeVar("Batch", bound=AnyBatch)


class TrainingSettings(NamedTuple):
    """How long and how fast: AdamW, a linear warm-up, then linear decay to 0."""

    epochs: int
    steps: int  # of all epochs
    learning_rate: float
    warmup: float  # share of all steps
    weight_decay: float
    evaluations_per_epoch: int
    patience: int  # evaluations without improvement before it stops
    bfloat16: bool = False  # the forward pass in bfloat16 autocast; weights stay float32
    by_loss: bool = False  # the best state is that of the lowest validation loss, not the highest score


def fit(
    model: torch.nn.Module,
    epoch_batches: Callable[..., Iterable[Batch]],
    loss: Callable[[torch.nn.Module, Batch, float], torch.Tensor],
    validate: Callable[[torch.nn.Module], Validation],
    settings: TrainingSettings,
    advance: Callable[[int], None] = lambda rows: None,
    keeper: checkpoints.Checkpointer | None = None,
) -> Fit:
    """Train `model` and leave it in its best state: see training/selection.py.

    `epoch_batches(epoch)` yields the batches of an epoch, `epoch_batches(epoch, start)` those from the
    `start`th on; `loss(model, batch, done)` is minimised, where `done` goes from 0 at the first step to 1 at
    the last. `advance` is told how many targets each step saw. With a `keeper`, training goes on from its
    checkpoint to the bits that it would have come to undisturbed, and leaves its result there.
    Raises TrainingError where the loss is not finite.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs  # others want this file's types alone

    kept = keeper.kept if keeper else None
    if kept and "fit" in kept.numbers:
        model.load_state_dict(checkpoints.without_prefix("best.", kept.tensors))
        model.eval()
        return Fit(**kept.numbers["fit"])
    precision = "bf16" if settings.bfloat16 else "no"
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    total = settings.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, total, settings.warmup)
    )
    every = -(-total // (settings.epochs * settings.evaluations_per_epoch))

    def look(seen_by: torch.nn.Module) -> Validation:
        return Validation(*_agreed(accelerator, *validate(seen_by)))

    plain: torch.nn.Module = accelerator.unwrap_model(model)  # what lies in the wrapper of several processes
    state = _Progress(settings.by_loss)
    if kept:
        state.resume(kept, plain, optimizer, schedule)
        advance(state.targets)
        checkpoints.restore_random_state(kept.tensors["random"][accelerator.process_index])
    started = hardware.compute_seconds() - state.seconds
    while state.epoch < settings.epochs:
        model.train()
        start = state.batch
        for batch in state.timed(epoch_batches(state.epoch, start) if start else epoch_batches(state.epoch)):
            batch = batch.to(accelerator.device)
            with accelerator.autocast():
                value = loss(model, batch, min(1.0, state.steps / max(1, total - 1)))
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            seen, due = _agreed(accelerator, float(value.detach()), float(bool(keeper and keeper.due())))
            state.saw(batch, seen)
            advance(batch.num_targets)
            if state.steps % every == 0 or state.steps == total:
                state.look(plain, look, epoch=settings.epochs * state.steps / total)
                model.train()
            if state.since_best >= settings.patience:
                break
            if keeper and due:
                state.seconds = hardware.compute_seconds() - started
                _keep(keeper, state, plain, optimizer, accelerator)
        if state.since_best >= settings.patience:
            break
        state.epoch, state.batch = state.epoch + 1, 0
    if not state.curve or state.curve[-1]["step"] != state.steps:
        state.look(plain, look, epoch=settings.epochs * state.steps / total)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # autocast ends with training
    model.load_state_dict(state.best_state)
    model.eval()
    stopped = "patience" if state.since_best >= settings.patience else "epochs"
    seconds = hardware.compute_seconds() - started
    done = Fit(
        seconds, state.steps, state.rows, state.best_step, state.best.score, state.best.loss, stopped,
        state.targets / max(state.training_seconds, 1e-9),
        state.waiting_seconds / max(state.training_seconds, 1e-9), state.curve,
    )  # fmt: skip
    if keeper and accelerator.is_main_process:
        keeper.save({f"best.{name}": t for name, t in state.best_state.items()}, {"fit": done._asdict()})
    return done


class _Progress:
    """Where training stands, and the best state so far."""

    def __init__(self, by_loss: bool) -> None:
        self.steps = self.rows = self.targets = self.since_best = self.best_step = 0
        self.epoch = self.batch = 0  # where the next batch is: the whole state of the stream, beside the seed
        self.training_seconds = self.waiting_seconds = self.seconds = 0.0
        self.curve: list[dict[str, float]] = []
        self.best_state: dict[str, Any] = {}
        self.best = Validation(-1.0, math.inf)
        self._losses: list[float] = []
        self._by_loss = by_loss
        self._looking_seconds = 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; counts the time of the steps, and that of waiting for batches."""
        started = time.perf_counter()
        for batch in batches:
            ready = time.perf_counter()
            self.waiting_seconds += ready - started
            self._looking_seconds = 0.0
            yield batch
            self.training_seconds += time.perf_counter() - started - self._looking_seconds
            started = time.perf_counter()

    def saw(self, batch: AnyBatch, loss: float) -> None:
        self.steps += 1
        self.batch += 1
        self.rows += batch.num_rows
        self.targets += batch.num_targets
        self._losses.append(loss)
        _refuse_nonfinite("training", loss, self.steps)

    def numbers(self) -> dict[str, Any]:
        """All of it that is no tensor, as JSON has it."""
        own = {name: getattr(self, name) for name in SAVED_NUMBERS}
        return own | {"best": list(self.best), "losses": self._losses}

    def resume(
        self,
        kept: checkpoints.Checkpoint,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LambdaLR,
    ) -> None:
        """Be where a checkpoint was taken: with its weights, its optimizer's state, its learning rate."""
        for name in SAVED_NUMBERS:
            setattr(self, name, kept.numbers[name])
        self.best, self._losses = Validation(*kept.numbers["best"]), kept.numbers["losses"]
        device = next(model.parameters()).device
        best = checkpoints.without_prefix("best.", kept.tensors)
        self.best_state = {name: tensor.to(device) for name, tensor in best.items()}
        model.load_state_dict(checkpoints.without_prefix("model.", kept.tensors))
        checkpoints.restore_optimizer(model, optimizer, kept.tensors)
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": self.steps})
        for group, rate in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
            group["lr"] = rate * schedule.lr_lambdas[0](self.steps)

    def look(
        self, model: torch.nn.Module, validate: Callable[[torch.nn.Module], Validation], epoch: float
    ) -> None:
        started = time.perf_counter()
        model.eval()
        seen = validate(model)
        _refuse_nonfinite("validation", seen.loss, self.steps)
        self.curve.append(
            {
                "step": self.steps,
                "epoch": round(epoch, 3),
                "rows": self.rows,
                "train_loss": sum(self._losses) / len(self._losses),
                "validation_accuracy": seen.score,
                "validation_loss": seen.loss,
            }
        )
        self._losses = []
        self.since_best += 1
        if self._rank(seen) > self._rank(self.best):
            self.best, self.best_step, self.since_best = seen, self.steps, 0
            self.best_state = copy.deepcopy(model.state_dict())
        self._looking_seconds += time.perf_counter() - started

    def _rank(self, seen: Validation) -> tuple[float, float]:
        return rank(seen.score, seen.loss, self._by_loss)


def _keep(
    keeper: checkpoints.Checkpointer,
    state: _Progress,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: "Accelerator",
) -> None:
    """Write a checkpoint, on all processes at once: each has random numbers of its own."""
    random = accelerator.gather(checkpoints.random_state()[None].to(accelerator.device))
    if accelerator.is_main_process:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in state.best_state.items()}
        tensors |= checkpoints.optimizer_tensors(model, optimizer)
        keeper.save(tensors | {"random": random}, state.numbers())


def _agreed(accelerator: "Accelerator", *numbers: float) -> tuple[float, ...]:
    """The mean of these numbers over all processes, so that they decide alike; of one, the numbers."""
    if accelerator.num_processes == 1:
        return numbers
    mean = accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "mean")
    return tuple(mean.tolist())


def _refuse_nonfinite(which: str, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the {which} loss is {loss} at step {step}.\nLower learning_rate, or raise warmup."
        )


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor at a step: up over the first `warmup` share, then down to 0."""
    rise = max(1, round(warmup * total))
    return min((step + 1) / rise, max(0.0, (total - step) / max(1, total - rise)))
