"""One seed of a run: build the student, train it from the cache, save it. Runs in a process of its own."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState

from pipeline import (
    by_config,
    choosing,
    config_recipes,
    encoder_start,
    hardware,
    initialise,
    inputs,
    kinds,
    lessons,
    resuming,
    students,
)
from pipeline.batches import Stream
from pipeline.data import POOL, Rows
from pipeline.runs import Job, open_inputs, start_of
from pipeline.training import Fit, Settings, fit
from pipeline.tuning import Setup, fastest


class Trained(NamedTuple):
    """What became of one seed."""

    fit: Fit
    rows_seen: int  # whose target in the cache was looked at, each as often as it was
    cut_rows: int  # rows that lost tokens to the student's maximum
    by_loss: bool  # what its best state is chosen by: the lowest loss, or the highest accuracy
    setup: dict[str, Any]  # threads and precision, what was tried for them, padding


def train_seed(
    job: Job, tell: Callable[[int], object] = lambda targets: None, every_seconds: float = 0.5
) -> Trained:
    """Train one seed, and save it where it is no trial; go on from its checkpoint where there is one.

    `tell` hears how many targets there are in all, then how many more are done.
    Raises TrainingError where it diverges.
    """
    rank, ranks = hardware.ranks()
    if ranks > 1:
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()  # for the first one's tokenizer
    hardware.pin_threads(1)
    torch.manual_seed(job.seed)
    student, recipe = job.student, job.recipe
    cache, rows = open_inputs(job.paths)
    rows = rows.with_views(recipe.views, recipe.view_labels)
    if job.trial is not None:
        rows = choosing.held_out(rows, job.trial.fold, job.trial.folds)
    rows = rows.only("validation", *lessons.taught_by(recipe))
    reader = inputs.of_student(student, rows, job.paths.out / "tokenizer")
    stream = Stream(rank, ranks, job.readers)
    if isinstance(student, kinds.Llama):
        lesson = lessons.of_documents(student, recipe, cache, rows, job.seed, stream)
        num_ids = lesson.num_outputs
    else:
        lesson = lessons.of_rows(student, recipe, cache, rows, reader, job.seed, stream)
        num_ids = reader.num_ids
    model = students.build(student, num_ids, lesson.num_outputs)
    if isinstance(student, kinds.Transformers):
        settings = by_config.settings(student, num_ids, lesson.num_outputs, reader.pad_id, cache.labels)
        cast(students.Transformers, model).rebuild(settings)
        by_config.refuse_unfit(model, student, num_ids)
    if job.paths.init:
        model.load_state_dict(students.load(start_of(job.paths.init, job.seed)).state_dict())
    elif isinstance(student, kinds.Llama) and student.init:
        initialise.from_teacher(cast(students.Llama, model), student, cache.weights_dir)
    elif isinstance(student, kinds.FC | kinds.BiLSTM | kinds.TinyBERT) and student.init:
        encoder_start.begin(model, student, cache.weights_dir if cache.weights_layers else None)
    keeper = resuming.of_job(job, cache)
    setup = Setup(1, "float32", {})
    if keeper and keeper.kept:
        setup = Setup(**keeper.notes)
    elif cache.identity.spec.per_position and ranks > 1:  # all must run alike
        setup = Setup(job.threads, hardware.precision(recipe.precision), {})
    elif cache.identity.spec.per_position:
        setup = fastest(model, lesson, job.threads, recipe.precision)
        torch.manual_seed(job.seed)
    if keeper:
        keeper.notes = setup._asdict()
    if ranks > 1:
        torch.manual_seed(job.seed * ranks + rank)  # each drops units of its own rows
    hardware.pin_threads(setup.threads)
    tell(recipe.epochs * lesson.num_targets)
    done = fit(
        lesson.dress(model),
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
        keeper,
    )
    if job.trial is None and rank == 0:
        students.save(job.paths.out / f"seed-{job.seed}", model, student, num_ids, lesson.num_outputs)
    rows_seen = round(done.rows_seen * lesson.rows_a_piece * _share_asked(recipe, rows))
    told = {**setup._asdict(), "padding": lesson.padding}
    return Trained(done, rows_seen, lesson.cut_rows, lesson.by_loss, told)


def _share_asked(recipe: config_recipes.Recipe, rows: Rows) -> float:
    """Of the rows that are seen: those whose target is looked at."""
    pool = len(rows.select(POOL))
    return pool / (pool + len(rows.select("train"))) if recipe.pseudo_labels else 1.0


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
