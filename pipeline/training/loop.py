"""The training loop, for students and for teachers that are fine-tuned: small enough to read in one sitting.

`fit` takes batches, a loss and a validation as functions, so it knows nothing of caches, recipes or labels.
accelerate places the model on the device and, where asked, runs its forward pass in bfloat16. Where torchrun
started several processes, it averages their gradients: each trains on its part of every batch.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipeline.objectives.base import Validation
from pipeline.runtime import hardware
from pipeline.training import checkpoints
from pipeline.training.checkpoints import Checkpointer
from pipeline.training.job import Fit
from pipeline.training.progress import AnyBatch, TrainingProgress

if TYPE_CHECKING:
    from accelerate import Accelerator


MAX_GRADIENT_NORM = 1.0


class TrainingFunctions(NamedTuple):
    """What a training minimises, and on what."""

    batches: Callable[
        ..., Iterable[Any]
    ]  # of an epoch: batches(epoch), or batches(epoch, start) from there on
    loss: Callable[[torch.nn.Module, Any, float], torch.Tensor]  # of (model, batch, done): see `fit`
    validate: Callable[[torch.nn.Module], Validation]


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
    functions: TrainingFunctions,
    settings: TrainingSettings,
    report_progress: Callable[[int], None] = lambda targets: None,
    checkpointer: Checkpointer | None = None,
) -> Fit:
    """Train `model` and leave it in its best state: see training/selection.py.

    The loss of a step depends on `done`, which goes from 0 at the first step to 1 at the last.
    `report_progress` is called with the targets of each step. With a `checkpointer`, training continues from
    its checkpoint to the same bits as without the interruption, and the last checkpoint has the result.
    Raises TrainingError where the loss is not finite.
    """
    kept = checkpointer.kept if checkpointer else None
    if kept and "fit" in kept.numbers:
        model.load_state_dict(checkpoints.without_prefix("best.", kept.tensors))
        model.eval()
        return Fit(**kept.numbers["fit"])
    loop = _Loop(model, functions, settings, report_progress, checkpointer)
    if kept:
        loop.restore(kept)
    return loop.run()


class _Loop:
    """One training in this process."""

    def __init__(
        self,
        model: torch.nn.Module,
        functions: TrainingFunctions,
        settings: TrainingSettings,
        report_progress: Callable[[int], None],
        checkpointer: Checkpointer | None,
    ) -> None:
        self._functions, self._settings = functions, settings
        self._report_progress, self._checkpointer = report_progress, checkpointer
        self._accelerator = _accelerator(settings.bfloat16)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._model, self._optimizer = self._accelerator.prepare(model, optimizer)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, settings.steps, settings.warmup)
        )
        self._evaluate_every = -(-settings.steps // (settings.epochs * settings.evaluations_per_epoch))
        # Several processes train a wrapper of this.
        self._plain: torch.nn.Module = self._accelerator.unwrap_model(self._model)
        self._progress = TrainingProgress(settings.by_loss)

    def restore(self, kept: checkpoints.Checkpoint) -> None:
        """Continue from a checkpoint: weights, optimizer, learning rate, counters and random numbers."""
        progress = self._progress
        progress.restore(kept, next(self._plain.parameters()).device)
        self._plain.load_state_dict(checkpoints.without_prefix("model.", kept.tensors))
        checkpoints.restore_optimizer(self._plain, self._optimizer, kept.tensors)
        self._schedule.load_state_dict(self._schedule.state_dict() | {"last_epoch": progress.steps})
        for group, rate in zip(self._optimizer.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = rate * self._schedule.lr_lambdas[0](progress.steps)
        self._report_progress(progress.targets)
        checkpoints.restore_random_state(kept.tensors["random"][self._accelerator.process_index])

    def run(self) -> Fit:
        """All epochs, or as many as patience allows."""
        progress, settings = self._progress, self._settings
        self._started = hardware.compute_seconds() - progress.seconds
        while progress.epoch < settings.epochs:
            self._run_epoch()
            if self._out_of_patience:
                break
            progress.epoch, progress.batch = progress.epoch + 1, 0
        if not progress.curve or progress.curve[-1]["step"] != progress.steps:
            self._evaluate()
        return self._finish()

    @property
    def _out_of_patience(self) -> bool:
        return self._progress.since_best >= self._settings.patience

    def _run_epoch(self) -> None:
        """The rest of the epoch in which progress is."""
        progress, batches = self._progress, self._functions.batches
        self._model.train()
        start = progress.batch
        for batch in progress.timed(batches(progress.epoch, start) if start else batches(progress.epoch)):
            checkpoint_due = self._step(batch)
            if progress.steps % self._evaluate_every == 0 or progress.steps == self._settings.steps:
                self._evaluate()
                self._model.train()
            if self._out_of_patience:
                return
            if self._checkpointer and checkpoint_due:
                progress.seconds = hardware.compute_seconds() - self._started
                self._save_checkpoint(self._checkpointer)

    def _step(self, batch: AnyBatch) -> bool:
        """One step of the optimizer; whether a checkpoint is due, on all processes alike."""
        accelerator, progress = self._accelerator, self._progress
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            done = min(1.0, progress.steps / max(1, self._settings.steps - 1))
            loss = self._functions.loss(self._model, batch, done)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(self._model.parameters(), MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        due = bool(self._checkpointer and self._checkpointer.due())
        mean_loss, any_due = _mean_of_ranks(accelerator, float(loss.detach()), float(due))
        progress.count_step(batch, mean_loss)
        self._report_progress(batch.num_targets)
        return bool(any_due)

    def _evaluate(self) -> None:
        def validate(model: torch.nn.Module) -> Validation:
            return Validation(*_mean_of_ranks(self._accelerator, *self._functions.validate(model)))

        epoch = self._settings.epochs * self._progress.steps / self._settings.steps
        self._progress.evaluate(self._plain, validate, epoch)

    def _finish(self) -> Fit:
        """Load the best state into the model, and leave the result in the checkpoint."""
        progress, accelerator = self._progress, self._accelerator
        model = accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)  # autocast ends with training
        model.load_state_dict(progress.best_state)
        model.eval()
        seconds = max(progress.training_seconds, 1e-9)
        fitted = Fit(
            seconds=hardware.compute_seconds() - self._started,
            steps=progress.steps,
            rows_seen=progress.rows,
            best_step=progress.best_step,
            best_accuracy=progress.best.score,
            best_loss=progress.best.loss,
            stopped="patience" if self._out_of_patience else "epochs",
            targets_per_second=progress.targets / seconds,
            waiting=progress.waiting_seconds / seconds,
            curve=progress.curve,
        )
        if self._checkpointer and accelerator.is_main_process:
            best = {f"best.{name}": tensor for name, tensor in progress.best_state.items()}
            self._checkpointer.save(best, {"fit": fitted._asdict()})
        return fitted

    def _save_checkpoint(self, checkpointer: Checkpointer) -> None:
        """Write a checkpoint, on all processes at once: each has random numbers of its own."""
        accelerator = self._accelerator
        random = accelerator.gather(checkpoints.random_state()[None].to(accelerator.device))
        if accelerator.is_main_process:
            tensors = {f"model.{name}": tensor for name, tensor in self._plain.state_dict().items()}
            tensors |= {f"best.{name}": tensor for name, tensor in self._progress.best_state.items()}
            tensors |= checkpoints.optimizer_tensors(self._plain, self._optimizer)
            checkpointer.save(tensors | {"random": random}, self._progress.numbers())


def _accelerator(bfloat16: bool) -> "Accelerator":
    from accelerate import Accelerator, DistributedDataParallelKwargs  # others import this file's types alone

    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if bfloat16 else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _mean_of_ranks(accelerator: "Accelerator", *numbers: float) -> tuple[float, ...]:
    """The mean of these numbers over all processes, so that they decide alike; of one, the numbers."""
    if accelerator.num_processes == 1:
        return numbers
    mean = accelerator.reduce(torch.tensor(numbers, device=accelerator.device), "mean")
    return tuple(mean.tolist())


def learning_rate_factor(step: int, total: int, warmup: float) -> float:
    """The learning rate's factor at a step: up over the first `warmup` share, then down to 0."""
    rise = max(1, round(warmup * total))
    return min((step + 1) / rise, max(0.0, (total - step) / max(1, total - rise)))
