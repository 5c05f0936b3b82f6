"""One training as a value: its inputs (Job), its result (TrainedSeed), and the record of a run."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.params import RunInputs
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student
from pipeline.training.cross_validation import Trial
from storage.errors import AssetError


class Fit(NamedTuple):
    """The result of a training. The model has its best state afterwards."""

    seconds: float  # of training and validation: core-seconds on a CPU, seconds on a GPU
    steps: int
    rows_seen: int  # rows, or pieces of long ones
    best_step: int
    best_accuracy: float  # on validation, of the state that is kept
    best_loss: float  # likewise
    stopped: str  # "patience" or "epochs"
    targets_per_second: float  # of training without validation, by wall clock
    waiting: float  # share of that time in which a step waited for its batch
    curve: list[dict[str, float]]  # one entry an evaluation


RECORD = "training.json"


def training_record(directory: Path) -> dict[str, Any]:
    """The content of training.json of the run in `directory`. Raises AssetError where it has not ended."""
    path = directory / RECORD
    if not path.is_file():
        raise AssetError(
            f"{directory} has no {RECORD}: the run is not trained, or not to its end.\n"
            f"`dvc repro train@{directory.name}` continues it (train-after@ for a run in chained, "
            "train-tasks@ in multitask)."
        )
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def start_directory(init: Path, seed: int) -> Path:
    """The student of a trained run that this seed starts from: that of the same seed, or its only one."""
    own = init / f"seed-{seed}"
    return own if own.is_dir() else next(init.glob("seed-*"))


class TaskPart(NamedTuple):
    """One of several tasks that a student learns at once."""

    recipe: Recipe
    paths: RunInputs
    weight: float


class Job(NamedTuple):
    """One training of a run. Of several tasks, `recipe` and `paths` are those of the first."""

    seed: int
    threads: int  # at most
    student: Student
    recipe: Recipe
    paths: RunInputs
    trial: Trial | None = None  # the candidate and fold that it judges; None: a student that is saved
    readers: int = 1  # threads that read the cache
    checkpoint_minutes: float | None = None  # between checkpoints; None: no checkpoints
    parts: dict[str, TaskPart] = {}  # noqa: RUF012 (a default of NamedTuple is never changed)

    @property
    def one_by_one(self) -> dict[str, "Job"]:
        """Of several tasks: each as a training of its own."""
        return {
            task: self._replace(recipe=part.recipe, paths=part.paths, parts={})
            for task, part in self.parts.items()
        }

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"seed {self.seed}" if self.trial is None else str(self.trial)


def run_record(paths: RunInputs) -> dict[str, Any]:
    """The record of a run, or of one of its several tasks (`paths.task`)."""
    record = training_record(paths.out)
    return record if paths.task is None else record["tasks"][paths.task]


def write_curve(record: dict[str, Any], path: Path) -> None:
    """Write the learning curve as CSV for `dvc plots`: the mean over the seeds that have the point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    points: dict[int, list[dict[str, float]]] = {}
    for seed in record["seeds"]:
        for point in seed["curve"]:
            points.setdefault(point["rows"], []).append(point)
    columns = ("train_loss", "validation_loss", "validation_accuracy")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rows", "seeds", *columns])
        for rows, own in sorted(points.items()):
            means = [sum(point[column] for point in own) / len(own) for column in columns]
            writer.writerow([rows, len(own), *(f"{mean:.5f}" for mean in means)])


def seed_record(job: Job, done: "TrainedSeed") -> dict[str, Any]:
    """The record of one seed."""
    start = start_directory(job.paths.init, job.seed) if job.paths.init else None
    return {
        "seed": job.seed,
        **({"started_from": f"{start.parent.name}/{start.name}"} if start else {}),
        "teacher_rows_seen": done.teacher_rows_seen,
        "cut_rows": done.cut_rows,
        **done.setup,
        **done.fit._asdict(),
    }


class TrainedSeed(NamedTuple):
    """The result of one seed."""

    fit: Fit
    teacher_rows_seen: int  # rows whose cached target was used, counted each time
    cut_rows: int  # rows that lost tokens to the student's maximum
    by_loss: bool  # see training/selection.py
    setup: dict[str, Any]  # threads, precision, setups that were tried, padding; records of several tasks
