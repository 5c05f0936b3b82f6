"""One seed of a run: build the student, train it from the cache, save it. Runs in a process of its own."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import PartialState

from pipeline.config.recipes import Recipe
from pipeline.config.tasks import TASKS
from pipeline.data.inputs import Reader, student_reader
from pipeline.data.rows import POOL, Rows
from pipeline.runtime import hardware
from pipeline.streaming.batch import Stream
from pipeline.streaming.verified import open_inputs
from pipeline.students.base import Outputs
from pipeline.students.registry import build_student, load_student, save_student
from pipeline.training.autotune import StepSetup, fastest_setup
from pipeline.training.cross_validation import hold_out_fold
from pipeline.training.job import Job, TrainedSeed, start_directory
from pipeline.training.loop import TrainingSettings, fit
from pipeline.training.multitask import MultitaskWorkload
from pipeline.training.resume import checkpointer_of
from pipeline.training.workload import Workload, documents_workload, rows_workload, training_splits
from storage import Cache


def train_seed(
    job: Job, tell: Callable[[int], object] = lambda targets: None, every_seconds: float = 0.5
) -> TrainedSeed:
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
    stream = Stream(rank, ranks, job.readers, job.paths.decoded_bytes)
    own = {task: _taught(part_job, stream) for task, part_job in job.one_by_one.items()}
    cache, rows, reader, lesson, num_ids = next(iter(own.values())) if own else _taught(job, stream)
    labels, joined = cache.labels, None
    if own:
        weights = {name: part.weight for name, part in job.parts.items()}
        joined = MultitaskWorkload({name: taught.lesson for name, taught in own.items()}, weights)
        lesson = joined.lesson
        labels = tuple(f"{name}/{label}" for name, taught in own.items() for label in taught.cache.labels)
    model = build_student(student, num_ids, lesson.num_outputs)
    model.configure(student, Outputs(num_ids, labels, reader.pad_id))
    if job.paths.init:
        model.load_state_dict(load_student(start_directory(job.paths.init, job.seed)).state_dict())
    elif student.has_init:
        model.initialise(student, cache.weights_dir if cache.weights_layers else None)
    keeper = checkpointer_of(job)
    setup = StepSetup(1, "float32", {})
    if keeper and keeper.kept:
        setup = StepSetup(**keeper.notes["setup"])
        if joined:
            joined.resume(keeper.notes["tasks"])
    elif cache.identity.spec.per_position and ranks > 1:  # all must run alike
        setup = StepSetup(job.threads, hardware.precision(recipe.precision), {})
    elif cache.identity.spec.per_position:
        setup = fastest_setup(model, lesson, job.threads, recipe.precision)
        torch.manual_seed(job.seed)
    if keeper:
        keeper.notes = {"setup": setup._asdict(), "tasks": joined.kept if joined else None}
    if ranks > 1:
        torch.manual_seed(job.seed * ranks + rank)  # each drops units of its own rows
    hardware.pin_threads(setup.threads)
    tell(recipe.epochs * lesson.num_targets)
    done = fit(
        lesson.dress(model),
        lesson.batches,
        lesson.loss,
        lesson.validate,
        TrainingSettings(
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
        heads = joined.heads if joined else None
        save_student(job.paths.out / f"seed-{job.seed}", model, student, num_ids, lesson.num_outputs, heads)
    rows_seen = round(done.rows_seen * lesson.rows_a_piece * _share_asked(recipe, rows))
    told = {**setup._asdict(), "padding": lesson.padding}
    if joined:
        told["tasks"] = tasks = joined.told(done)
        for name, part in job.parts.items():
            asked = tasks[name]["rows_seen"] * _share_asked(part.recipe, own[name].rows)
            tasks[name]["teacher_rows_seen"] = round(asked)
        rows_seen = sum(task["teacher_rows_seen"] for task in tasks.values())
    return TrainedSeed(done, rows_seen, lesson.cut_rows, lesson.by_loss, told)


class _Taught(NamedTuple):
    """What a student of one task learns from."""

    cache: Cache
    rows: Rows
    reader: Reader
    lesson: Workload
    num_ids: int  # of the vocabulary, or numbers of an image


def _taught(job: Job, stream: Stream) -> _Taught:
    student, recipe = job.student, job.recipe
    cache, rows = open_inputs(job.paths)
    rows = rows.with_views(recipe.views, recipe.view_labels)
    if job.trial is not None:
        rows = hold_out_fold(rows, job.trial.fold, job.trial.folds)
    rows = rows.only("validation", *training_splits(recipe))
    reader = student_reader(student, rows, job.paths.out / "tokenizer")
    if TASKS[cache.identity.spec.task].predicts_next:
        lesson = documents_workload(reader.max_length, recipe, cache, rows, job.seed, stream)
        return _Taught(cache, rows, reader, lesson, lesson.num_outputs)
    lesson = rows_workload(student, recipe, cache, rows, reader, job.seed, stream)
    return _Taught(cache, rows, reader, lesson, reader.num_ids)


def _share_asked(recipe: Recipe, rows: Rows) -> float:
    """Of the rows that are seen: those whose target is looked at."""
    if recipe.labels_only:
        return 0.0
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
