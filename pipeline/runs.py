"""The train stage: a run is one student and one recipe on one cache, over several seeds.

A run's directory: tokenizer/ (what the student reads with), seed-<n>/ (a student, see students.py),
training.json. Seeds train side by side in processes of their own. Classifiers have one thread each: small
models gain little from more, and a result then does not depend on how many run at once. Language models share
the cores (tuning.py). torch is imported by those processes alone.
"""

import csv
import json
import multiprocessing as mp
import shutil
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline import choosing, config, config_recipes, hardware, kinds, ranks
from pipeline.data import POOL, Rows, load_rows
from pipeline.progress import bars, log
from pipeline.run_checks import RECORD, refuse_run, refuse_start, start_of, trained
from pipeline.tokens import TextReader
from storage import Cache
from storage.errors import TrainingError
from storage.mixture import Mixture, open_cache

if TYPE_CHECKING:
    from pipeline.seeds import Trained

PROGRESS_SECONDS = 0.5
SEEDS_PER_CORE = 2  # three seeds on two cores end sooner sharing them than in two turns
SKIPPED = "skipped"
# Imported once, then forked; all but the first would be imported late by every seed, for two seconds.
PRELOADED = ["pipeline.seeds", "torch._dynamo", "pyarrow.dataset", "pandas"]


class _Failure(NamedTuple):
    """What ended a seed."""

    error: Exception
    traceback: str


class Part(NamedTuple):
    """One of several tasks that a student learns at once."""

    recipe: config_recipes.Recipe
    paths: config.RunPaths
    weight: float


class Job(NamedTuple):
    """One training of a run. Of several tasks, `recipe` and `paths` are those of the first."""

    seed: int
    threads: int  # at most so many
    student: kinds.Student
    recipe: config_recipes.Recipe
    paths: config.RunPaths
    trial: choosing.Trial | None = None  # what it judges; None: a student that is kept
    readers: int = 1  # threads that read the cache for it
    checkpoint_minutes: float | None = None  # how often it writes down where it stands; None: never
    parts: dict[str, Part] = {}  # noqa: RUF012 (a default of NamedTuple is never changed)

    @property
    def one_by_one(self) -> dict[str, "Job"]:
        """Of several tasks: each as if it were alone."""
        return {
            task: self._replace(recipe=part.recipe, paths=part.paths, parts={})
            for task, part in self.parts.items()
        }

    @property
    def label(self) -> str:
        """What people call it."""
        return f"seed {self.seed}" if self.trial is None else str(self.trial)


def open_inputs(paths: config.RunPaths) -> tuple[Cache, Rows]:
    """The cache (or mixture) and the prepared rows of a run.

    Rows to train on that a mixture skips have the split SKIPPED: none that anything selects.
    """
    cache, rows = open_cache(paths.cache, paths.local_bytes), load_rows(paths.dataset)
    if isinstance(cache, Mixture) and cache.missing == "skip":
        left_out = np.isin(rows.splits, ("train", POOL)) & ~cache.known(rows.row_ids)
        rows = rows._replace(splits=np.where(left_out, SKIPPED, rows.splits))
    return cache, rows


def train(
    name: str,
    run: config.Run,
    student: kinds.Student,
    recipe: config_recipes.Recipe,
    seeds_at_once: int | None,
    paths: config.RunPaths,
    readers: int = 1,
    checkpoint_minutes: float | None = None,
) -> dict[str, Any]:
    """Train every seed of a run and write its directory; return the content of training.json.

    Refuses a cache that was not verified or does not fit, before the first step. Where an earlier process was
    killed, it goes on from the checkpoints that were left; they are removed when the run is done. Processes
    that torchrun started train one seed after the other together, and the first of them writes.
    """
    rank, num_ranks = hardware.ranks()
    first = rank == 0
    if num_ranks == 1:
        start_importing()
    else:
        ranks.refuse_misfit(name, recipe, num_ranks)
    cache, rows = open_inputs(paths)
    refuse_run(name, cache, rows, student, recipe, paths.verified)
    refuse_start(name, cache, student, paths.init)
    if first:
        if paths.out.exists():
            shutil.rmtree(paths.out)
        make_reader(student, cache, rows, paths.out / "tokenizer", paths.init)
    record: dict[str, Any] = {"family": recipe.family}
    if skipped := len(rows.select(SKIPPED)):
        record["skipped_rows"] = skipped
        log(f"{name}: {skipped:,} rows are left out, because a cache lacks them")
    if recipe.grid:
        job = Job(run.seeds[0], 1, student, recipe, paths, None, readers, checkpoint_minutes)
        recipe, record["choice"] = _choose(name, rows, job, seeds_at_once)
    jobs = [Job(seed, 1, student, recipe, paths, None, readers, checkpoint_minutes) for seed in run.seeds]
    trained = side_by_side(name, jobs, seeds_at_once)
    if first:
        tell(name, trained)
    record["seeds"] = [seed_record(job, done) for job, done in zip(jobs, trained, strict=True)]
    if first:
        write_json(record, paths.out / RECORD)
        if paths.checkpoints:
            shutil.rmtree(paths.checkpoints, ignore_errors=True)
    return record


def make_reader(
    student: kinds.Student, cache: Cache, rows: Rows, directory: Path, init: Path | None = None,
    others: Sequence[Rows] = (),
) -> None:  # fmt: skip
    """Put what the student reads with into `directory`: the cache's tokenizer, or one learned from the text.

    A learned one sees the training and pool text of the dataset (and of `others`, those of its other tasks),
    never validation or test. A student that starts from that of another run reads as that does.
    """
    if isinstance(student, kinds.MLP):
        directory.parent.mkdir(parents=True)  # images are read without one
    elif init:
        shutil.copytree(init / "tokenizer", directory)
    elif student.tokenizer == "teacher":
        shutil.copytree(cache.tokenizer_dir, directory)
    else:
        learned = [own.texts.take(own.select("train", POOL)).to_pylist() for own in (rows, *others)]
        texts = [text for own in learned for text in own]
        TextReader.learn(texts, student.tokenizer, directory, student.max_length)


def read_record(paths: config.RunPaths) -> dict[str, Any]:
    """What training wrote of a run, or of the one of its several tasks that is meant."""
    record = trained(paths.out)
    return record if paths.task is None else record["tasks"][paths.task]


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write `value` where people and `dvc metrics` read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_curve(record: dict[str, Any], path: Path) -> None:
    """The learning curve as CSV for `dvc plots`: the mean over the seeds that got that far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    looks: dict[int, list[dict[str, float]]] = {}
    for seed in record["seeds"]:
        for point in seed["curve"]:
            looks.setdefault(point["rows"], []).append(point)
    columns = ("train_loss", "validation_loss", "validation_accuracy")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["rows", "seeds", *columns])
        for rows, points in sorted(looks.items()):
            means = [sum(point[column] for point in points) / len(points) for column in columns]
            writer.writerow([rows, len(points), *(f"{mean:.5f}" for mean in means)])


def _choose(
    name: str, rows: Rows, job: Job, seeds_at_once: int | None
) -> tuple[config_recipes.Recipe, dict[str, Any]]:
    """(the best recipe of the job's grid, all that was tried for it: see choosing.py)."""
    grid, folds = job.recipe.grid, job.recipe.folds
    for fold in range(folds):
        choosing.held_out(rows, fold, folds)  # an empty one is refused before the first step
    log(f"{name}: choosing among {len(grid)} recipes, {folds} trainings each")
    jobs = [
        job._replace(recipe=job.recipe.chosen(trial.values), trial=trial)
        for trial in choosing.trials(job.recipe)
    ]
    trained = side_by_side(name, jobs, seeds_at_once)
    fits = [done.fit for done in trained]
    scores = [
        choosing.Score([fit.best_accuracy for fit in own], [fit.best_loss for fit in own])
        for own in (fits[start : start + folds] for start in range(0, len(fits), folds))
    ]
    best = choosing.best(scores, trained[0].by_loss)
    log(f"{name}: chose {choosing.told(grid[best])}")
    tried = [
        {"values": _plain(values), **score._asdict()} for values, score in zip(grid, scores, strict=True)
    ]
    record: dict[str, Any] = {"folds": folds, "seed": job.seed}
    record |= {"judged_by": "loss" if trained[0].by_loss else "accuracy"}
    record |= {"seconds": sum(fit.seconds for fit in fits), "chosen": _plain(grid[best]), "candidates": tried}
    return job.recipe.chosen(grid[best]), record


def _plain(values: choosing.Values) -> dict[str, Any]:
    return {field: value if isinstance(value, int | float) else str(value) for field, value in values.items()}


def seed_record(job: Job, done: "Trained") -> dict[str, Any]:
    """What the record of a run says of one seed."""
    start = start_of(job.paths.init, job.seed) if job.paths.init else None
    return {
        "seed": job.seed,
        **({"started_from": f"{start.parent.name}/{start.name}"} if start else {}),
        "teacher_rows_seen": done.rows_seen,
        "cut_rows": done.cut_rows,
        **done.setup,
        **done.fit._asdict(),
    }


def side_by_side(name: str, jobs: list[Job], seeds_at_once: int | None) -> list["Trained"]:
    """Train the jobs in processes side by side, with a bar each; they share the cores. The first error ends
    all."""
    if hardware.ranks()[1] > 1:
        return ranks.one_by_one(jobs)
    at_once = min(len(jobs), seeds_at_once or SEEDS_PER_CORE * hardware.num_cores())
    threads = max(1, hardware.num_cores() // at_once)
    jobs = [job._replace(threads=threads) for job in jobs]
    waiting = list(reversed(range(len(jobs))))
    running: dict[Connection[Any, Any], tuple[int, BaseProcess]] = {}
    trained: dict[int, Trained] = {}
    advance: dict[int, Callable[[int], None]] = {}
    with bars("targets") as add:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    pipe, process = _start(jobs[waiting[-1]])
                    running[pipe] = waiting.pop(), process
                ready = set(wait(list(running)))
                for pipe in [pipe for pipe in running if pipe in ready]:
                    place, process = running[pipe]
                    news = _hear(name, jobs[place], pipe)
                    if not isinstance(news, int):
                        trained[place] = news
                        del running[pipe]
                        process.join()
                    elif place in advance:
                        advance[place](news)
                    else:  # the first number is that of all its rows
                        advance[place] = add(f"training {name}, {jobs[place].label}", news)
        finally:
            for _, process in running.values():
                process.terminate()
                process.join()
    return [trained[place] for place in range(len(jobs))]


def tell(name: str, trained: list["Trained"]) -> None:
    """Log a line about what became of the seeds."""
    fits = [done.fit for done in trained]
    accuracy = sum(done.best_accuracy for done in fits) / len(fits)
    loss = sum(done.best_loss for done in fits) / len(fits)
    seconds = sum(done.seconds for done in fits) / len(fits)
    log(
        f"{name}: validation accuracy {accuracy:.3f}, loss {loss:.3f} over {len(fits)} seeds, "
        f"{seconds:.0f} core-seconds each"
    )


def start_importing() -> None:
    """Let the process that seeds are forked from import torch while this one looks at its inputs."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def _start(job: Job) -> "tuple[Connection[Any, Any], BaseProcess]":
    """A process that trains one seed, and the pipe that it tells of it through."""
    context = mp.get_context("forkserver")
    hears, tells = context.Pipe(duplex=False)
    process = context.Process(target=_train_seed, args=(job, tells), daemon=True)
    process.start()
    tells.close()  # so that the pipe ends with the process, however that ends
    return hears, process


def _train_seed(job: Job, tells: "Connection[Any, Any]") -> None:
    """In a process of its own: send rows as they are done, then what became of the seed, or the error."""
    try:
        from pipeline.seeds import train_seed  # by name, so that the process above never imports torch

        tells.send(train_seed(job, tells.send, PROGRESS_SECONDS))
    except Exception as error:
        tells.send(_Failure(error, traceback.format_exc()))


def _hear(name: str, job: Job, pipe: "Connection[Any, Any]") -> "int | Trained":
    """The next news of a seed. Raises its error; TrainingError where it diverged or its process is gone."""
    try:
        news: int | Trained | _Failure = pipe.recv()
    except EOFError:
        raise TrainingError(
            f"runs.{name}, {job.label}: its process ended without a word (see above).\n"
            "If memory was short, lower workers.seeds_at_once."
        ) from None
    if not isinstance(news, _Failure):
        return news
    where = RuntimeError(f"in the process of {job.label}:\n{news.traceback}")
    if isinstance(news.error, TrainingError):
        raise TrainingError(f"runs.{name}, {job.label}: {news.error}") from where
    raise news.error from where
