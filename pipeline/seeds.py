"""One seed of a run: build the student, train it from the cache, save it. Runs in a process of its own."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from pipeline import hardware, students
from pipeline.batches import CachedRows, DistillBatch
from pipeline.data import POOL
from pipeline.losses import label_loss, recipe_loss
from pipeline.runs import Job, open_inputs
from pipeline.tokens import TextReader
from pipeline.training import Fit, Settings, Validation, fit
from storage.spec import Sample, Threshold

EVALUATION_ROWS = 256


class Trained(NamedTuple):
    """What became of one seed."""

    fit: Fit
    cut_rows: int  # rows that lost tokens to the student's maximum


def train_seed(
    job: Job, tell: Callable[[int], object] = lambda rows: None, every_seconds: float = 0.5
) -> Trained:
    """Train and save one seed, on one thread.

    `tell` hears how many rows there are in all, then how many more are done.
    Raises TrainingError where it diverges.
    """
    hardware.pin_threads(1)
    torch.manual_seed(job.seed)
    student, recipe = job.student, job.recipe
    taught_by = ("train", POOL) if recipe.pool else ("train",)
    cache, rows = open_inputs(job.paths)
    rows = rows.only(*taught_by, "validation")
    reader = TextReader(job.paths.out / "tokenizer", student.max_length, "truncate")
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    cached = CachedRows(cache, rows, tokens, reader.pad_id, taught_by)
    held_out = CachedRows(cache, rows, tokens, reader.pad_id, ("validation",))
    sampled = isinstance(cache.codec, Sample | Threshold)
    model = students.build(student, reader.num_ids, len(cache.labels))
    tell(recipe.epochs * cached.num_rows)
    done = fit(
        model,
        lambda epoch: cached.epoch(job.seed, epoch, recipe.batch_rows),
        lambda logits, batch: _loss(job, sampled, logits, batch),
        lambda trained: _validate(trained, held_out),
        Settings(
            epochs=recipe.epochs,
            steps_per_epoch=cached.num_batches(recipe.batch_rows),
            learning_rate=student.learning_rate,
            warmup=recipe.warmup,
            weight_decay=recipe.weight_decay,
            evaluations_per_epoch=recipe.evaluations_per_epoch,
            patience=recipe.patience,
        ),
        _in_gulps(tell, every_seconds),
    )
    students.save(job.paths.out / f"seed-{job.seed}", model, student, reader.num_ids, len(cache.labels))
    return Trained(done, tokens.num_cut)


def answers(model: torch.nn.Module, cached: CachedRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student logits [N, C], teacher logits [N, C], labels [N]) of all rows, in one order.

    Entries of a sparse cache count as `SparseTargets.logits` has them.
    """
    device = next(model.parameters()).device
    said, teacher, labels = [], [], []
    with torch.inference_mode():
        for batch in cached.in_order(EVALUATION_ROWS):
            said.append(model(batch.ids_BL.to(device), batch.mask_BL.to(device)).cpu())
            wanted = batch.teacher
            teacher.append(wanted if isinstance(wanted, torch.Tensor) else wanted.logits(said[-1].shape[1]))
            labels.append(batch.labels_B)
    return torch.cat(said), torch.cat(teacher), torch.cat(labels)


def _loss(job: Job, sampled: bool, logits_BC: torch.Tensor, batch: DistillBatch) -> torch.Tensor:
    recipe = job.recipe
    return recipe_loss(
        logits_BC, batch.labels_B, batch.teacher, recipe.alpha, recipe.temperature, recipe.divergence,
        recipe.skew, sampled,
    )  # fmt: skip


def _validate(model: torch.nn.Module, held_out: CachedRows) -> Validation:
    logits, _, labels = answers(model, held_out)
    return Validation((logits.argmax(1) == labels).float().mean().item(), label_loss(logits, labels).item())


def _in_gulps(tell: Callable[[int], object], every: float) -> Callable[[int], None]:
    """Rows done, passed on now and then: a message a step would cost more than the step."""
    held, last = 0, time.monotonic()

    def advance(rows: int) -> None:
        nonlocal held, last
        held += rows
        if time.monotonic() - last > every:
            tell(held)
            held, last = 0, time.monotonic()

    return advance
