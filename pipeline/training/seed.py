"""One seed of a run: builds the student, trains it from the cache, saves it. Runs in a process of its own."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from pipeline.config.recipes import Recipe
from pipeline.config.tasks import TASKS
from pipeline.data.inputs import student_reader
from pipeline.data.rows import POOL, Rows
from pipeline.runtime import hardware
from pipeline.streaming.batch import Stream
from pipeline.streaming.verified import open_inputs
from pipeline.students.base import Outputs, StudentModel
from pipeline.students.registry import build_student, load_student, save_student
from pipeline.training.autotune import StepSetup, fastest_setup
from pipeline.training.checkpoints import Checkpointer
from pipeline.training.cross_validation import hold_out_fold
from pipeline.training.documents_workload import documents_workload
from pipeline.training.job import Fit, Job, TrainedSeed, start_directory
from pipeline.training.loop import TrainingSettings, fit
from pipeline.training.multitask import MultitaskWorkload
from pipeline.training.resume import checkpointer_of
from pipeline.training.rows_workload import rows_workload
from pipeline.training.workload import TrainingData, Workload, training_splits


def train_seed(
    job: Job, report_progress: Callable[[int], object] = lambda targets: None, every_seconds: float = 0.5
) -> TrainedSeed:
    """Train one seed, and save it where it is not a trial; continue from its checkpoint where there is one.

    `report_progress` is called with the number of targets in all, then with those that are done since the
    last call. Raises TrainingError where the loss is not finite.
    """
    rank, ranks = hardware.ranks()
    if ranks > 1:
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()  # the first writes the tokenizer
    hardware.pin_threads(1)
    torch.manual_seed(job.seed)
    tasks = _Tasks(job, Stream(rank, ranks, job.readers, job.paths.decoded_bytes))
    model = _first_weights(job, tasks)
    checkpointer = checkpointer_of(job)
    setup = _step_setup(job, tasks, model, checkpointer)
    if checkpointer:
        checkpointer.notes = {"setup": setup._asdict(), "tasks": tasks.counts}
    if ranks > 1:
        torch.manual_seed(job.seed * ranks + rank)  # each rank drops units of its own rows
    hardware.pin_threads(setup.threads)
    workload = tasks.workload
    report_progress(job.recipe.epochs * workload.num_targets)
    fitted = fit(
        workload.wrap(model), workload.functions, _settings(job, workload, setup),
        _every(every_seconds, report_progress), checkpointer,
    )  # fmt: skip
    if job.trial is None and rank == 0:
        out = job.paths.out / f"seed-{job.seed}"
        save_student(out, model, job.student, tasks.num_ids, workload.num_outputs, tasks.heads)
    return tasks.result(fitted, setup)


class _TaskData(NamedTuple):
    """One task of a student: its data and its workload."""

    data: TrainingData
    workload: Workload
    num_ids: int  # of the vocabulary, or numbers of an image


class _Tasks:
    """The one task of a job, or its several tasks."""

    def __init__(self, job: Job, stream: Stream) -> None:
        self._job, self._multitask = job, None
        self._parts = {task: _open_task(own, stream) for task, own in job.one_by_one.items()}
        self.first = next(iter(self._parts.values())) if self._parts else _open_task(job, stream)
        self.workload, self.labels = self.first.workload, self.first.data.cache.labels
        if self._parts:
            workloads = {name: part.workload for name, part in self._parts.items()}
            weights = {name: part.weight for name, part in job.parts.items()}
            self._multitask = MultitaskWorkload(workloads, weights)
            self.workload = self._multitask.workload
            owned = ((name, part.data.cache.labels) for name, part in self._parts.items())
            self.labels = tuple(f"{name}/{label}" for name, labels in owned for label in labels)

    @property
    def num_ids(self) -> int:
        """Of the vocabulary, or numbers of an image: the same in all tasks."""
        return self.first.num_ids

    @property
    def heads(self) -> dict[str, tuple[int, int]] | None:
        """The outputs of each of several tasks."""
        return self._multitask.heads if self._multitask else None

    @property
    def counts(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of several tasks."""
        return self._multitask.counts if self._multitask else None

    def resume(self, counts: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        if self._multitask:
            self._multitask.resume(counts)

    def result(self, fitted: Fit, setup: StepSetup) -> TrainedSeed:
        """The result of the seed, with the number of rows whose cached target was used."""
        recipe, workload = self._job.recipe, self.workload
        record = {**setup._asdict(), "padding": workload.padding}
        rows_seen = fitted.rows_seen * workload.rows_per_item
        teacher_rows = round(rows_seen * _share_with_targets(recipe, self.first.data.rows))
        if self._multitask:
            record["tasks"] = tasks = self._multitask.task_records(fitted)
            for name, part in self._job.parts.items():
                share = _share_with_targets(part.recipe, self._parts[name].data.rows)
                tasks[name]["teacher_rows_seen"] = round(tasks[name]["rows_seen"] * share)
            teacher_rows = sum(task["teacher_rows_seen"] for task in tasks.values())
        return TrainedSeed(fitted, teacher_rows, workload.cut_rows, workload.by_loss, record)


def _open_task(job: Job, stream: Stream) -> _TaskData:
    student, recipe = job.student, job.recipe
    cache, rows = open_inputs(job.paths)
    rows = rows.with_views(recipe.views, recipe.view_labels)
    if job.trial is not None:
        rows = hold_out_fold(rows, job.trial.fold, job.trial.folds)
    rows = rows.only("validation", *training_splits(recipe))
    data = TrainingData(cache, rows, student_reader(student, rows, job.paths.out / "tokenizer"))
    if TASKS[cache.identity.spec.task].predicts_next:
        workload = documents_workload(recipe, data, job.seed, stream)
        return _TaskData(data, workload, workload.num_outputs)
    return _TaskData(data, rows_workload(student, recipe, data, job.seed, stream), data.reader.num_ids)


def _first_weights(job: Job, tasks: _Tasks) -> StudentModel:
    """The student before its first step."""
    student, (cache, _, reader) = job.student, tasks.first.data
    model = build_student(student, tasks.num_ids, tasks.workload.num_outputs)
    model.configure(student, Outputs(tasks.num_ids, tasks.labels, reader.pad_id))
    if job.paths.init:
        model.load_state_dict(load_student(start_directory(job.paths.init, job.seed)).state_dict())
    elif student.has_init:
        model.initialise(student, cache.weights_dir if cache.weights_layers else None)
    return model


def _step_setup(job: Job, tasks: _Tasks, model: StudentModel, checkpointer: Checkpointer | None) -> StepSetup:
    """Threads and precision of a step: those of the checkpoint, or what is fastest here."""
    if checkpointer and checkpointer.kept:
        tasks.resume(checkpointer.notes["tasks"])
        return StepSetup(**checkpointer.notes["setup"])
    if not tasks.first.data.cache.identity.spec.per_position:  # classifiers: see run.py
        return StepSetup(1, "float32", {})
    if hardware.ranks()[1] > 1:  # all ranks must run alike
        return StepSetup(job.threads, hardware.precision(job.recipe.precision), {})
    setup = fastest_setup(model, tasks.workload, job.threads, job.recipe.precision)
    torch.manual_seed(job.seed)
    return setup


def _settings(job: Job, workload: Workload, setup: StepSetup) -> TrainingSettings:
    recipe = job.recipe
    return TrainingSettings(
        epochs=recipe.epochs,
        steps=workload.steps,
        learning_rate=job.student.learning_rate,
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
        evaluations_per_epoch=recipe.evaluations_per_epoch,
        patience=recipe.patience,
        bfloat16=setup.precision == "bfloat16",
        by_loss=workload.by_loss,
    )


def _share_with_targets(recipe: Recipe, rows: Rows) -> float:
    """The share of the rows whose cached target is used."""
    if recipe.labels_only:
        return 0.0
    pool = len(rows.select(POOL))
    return pool / (pool + len(rows.select("train"))) if recipe.pseudo_labels else 1.0


def _every(seconds: float, report_progress: Callable[[int], object]) -> Callable[[int], None]:
    """`report_progress`, at most once in this time: a message for each step would cost more than the step."""
    held, last = 0, time.monotonic()

    def advance(targets: int) -> None:
        nonlocal held, last
        held += targets
        if time.monotonic() - last > seconds:
            report_progress(held)
            held, last = 0, time.monotonic()

    return advance
