"""One seed of a run: build the student, train it from the cache, save it. Runs in a process of its own."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch

from pipeline import hardware, initialise, inputs, kinds, lessons, students
from pipeline.data import POOL
from pipeline.runs import Job, open_inputs
from pipeline.training import Fit, Settings, fit
from pipeline.tuning import Setup, fastest


class Trained(NamedTuple):
    """What became of one seed."""

    fit: Fit
    rows_seen: int  # of the cache, each as often as it was seen
    cut_rows: int  # rows that lost tokens to the student's maximum
    setup: dict[str, Any]  # threads and precision, what was tried for them, padding


def train_seed(
    job: Job, tell: Callable[[int], object] = lambda targets: None, every_seconds: float = 0.5
) -> Trained:
    """Train and save one seed.

    `tell` hears how many targets there are in all, then how many more are done.
    Raises TrainingError where it diverges.
    """
    hardware.pin_threads(1)
    torch.manual_seed(job.seed)
    student, recipe = job.student, job.recipe
    cache, rows = open_inputs(job.paths)
    rows = rows.only("train", "validation", *((POOL,) if recipe.pool else ()))
    reader = inputs.of_student(student, rows, job.paths.out / "tokenizer")
    if isinstance(student, kinds.Llama):
        lesson = lessons.of_documents(student, recipe, cache, rows, job.seed)
        num_ids = lesson.num_outputs
    else:
        lesson = lessons.of_rows(student, recipe, cache, rows, reader, job.seed)
        num_ids = reader.num_ids
    model = students.build(student, num_ids, lesson.num_outputs)
    if isinstance(student, kinds.Llama) and student.init:
        initialise.from_teacher(cast(students.Llama, model), student, cache.weights_dir)
    setup = Setup(1, "float32", {})
    if cache.identity.spec.per_position:
        setup = fastest(model, lesson, job.threads, recipe.precision)
        torch.manual_seed(job.seed)
    hardware.pin_threads(setup.threads)
    tell(recipe.epochs * lesson.num_targets)
    done = fit(
        model,
        lesson.batches,
        lesson.loss,
        lesson.validate,
        Settings(
            epochs=recipe.epochs,
            steps=lesson.steps,
            learning_rate=student.learning_rate,
            warmup=recipe.warmup,
            weight_decay=recipe.weight_decay,
            evaluations_per_epoch=recipe.evaluations_per_epoch,
            patience=recipe.patience,
            bfloat16=setup.precision == "bfloat16",
            by_loss=lesson.by_loss,
        ),
        _in_gulps(tell, every_seconds),
    )
    students.save(job.paths.out / f"seed-{job.seed}", model, student, num_ids, lesson.num_outputs)
    rows_seen = round(done.rows_seen * lesson.rows_a_piece)
    return Trained(done, rows_seen, lesson.cut_rows, {**setup._asdict(), "padding": lesson.padding})


def _in_gulps(tell: Callable[[int], object], every: float) -> Callable[[int], None]:
    """Targets done, passed on now and then: a message a step would cost more than the step."""
    held, last = 0, time.monotonic()

    def advance(targets: int) -> None:
        nonlocal held, last
        held += targets
        if time.monotonic() - last > every:
            tell(held)
            held, last = 0, time.monotonic()

    return advance
