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
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import config, config_recipes, hardware, kinds
from pipeline.data import POOL, SPLITS, Rows, load_rows
from pipeline.decoders import refuse_misfit
from pipeline.progress import bars, log
from pipeline.targets import refuse_recipe, refuse_task, refuse_truncated
from pipeline.tokens import TextReader
from storage import Cache
from storage.errors import ConfigError, DataError, Mismatch, SpecMismatch, TrainingError

if TYPE_CHECKING:
    from pipeline.seeds import Trained

PROGRESS_SECONDS = 0.5
SEEDS_PER_CORE = 2  # three seeds on two cores end sooner sharing them than in two turns
RECORD = "training.json"
# Imported once, then forked; all but the first would be imported late by every seed, for two seconds.
PRELOADED = ["pipeline.seeds", "torch._dynamo", "pyarrow.dataset", "pandas"]


class _Failure(NamedTuple):
    """What ended a seed."""

    error: Exception
    traceback: str


class Job(NamedTuple):
    """One seed of a run."""

    seed: int
    threads: int  # at most so many
    student: kinds.Student
    recipe: config_recipes.Recipe
    paths: config.RunPaths


def open_inputs(paths: config.RunPaths) -> tuple[Cache, Rows]:
    """The cache and the prepared rows of a run."""
    return Cache.open(paths.cache), load_rows(paths.dataset)


def train(
    name: str,
    run: config.Run,
    student: kinds.Student,
    recipe: config_recipes.Recipe,
    seeds_at_once: int | None,
    paths: config.RunPaths,
) -> dict[str, Any]:
    """Train every seed of a run and write its directory; return the content of training.json.

    Refuses a cache that was not verified or does not fit, before the first step.
    """
    _start_importing()
    cache, rows = open_inputs(paths)
    _refuse_misfit(name, cache, rows, student, recipe, paths.verified)
    _refuse_start(name, cache, student)
    if paths.out.exists():
        shutil.rmtree(paths.out)
    make_reader(student, cache, rows, paths.out / "tokenizer")
    at_once = min(len(run.seeds), seeds_at_once or SEEDS_PER_CORE * hardware.num_cores())
    threads = max(1, hardware.num_cores() // at_once)
    jobs = [Job(seed, threads, student, recipe, paths) for seed in run.seeds]
    trained = _side_by_side(name, jobs, at_once)
    record = {"seeds": [_seed_record(job, done) for job, done in zip(jobs, trained, strict=True)]}
    write_json(record, paths.out / RECORD)
    return record


def make_reader(student: kinds.Student, cache: Cache, rows: Rows, directory: Path) -> None:
    """Put what the student reads with into `directory`: the cache's tokenizer, or one learned from the text.

    A learned one sees the training and pool text of the dataset, never validation or test.
    """
    if isinstance(student, kinds.MLP):
        directory.parent.mkdir(parents=True)  # images are read without one
    elif student.tokenizer == "teacher":
        shutil.copytree(cache.tokenizer_dir, directory)
    else:
        texts = rows.texts.take(rows.select("train", POOL)).to_pylist()
        TextReader.learn(texts, student.tokenizer, directory, student.max_length)


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


def _refuse_misfit(
    name: str, cache: Cache, rows: Rows, student: kinds.Student, recipe: config_recipes.Recipe, verified: Path
) -> None:
    known = json.loads(verified.read_text())["manifest"] if verified.is_file() else "nothing"
    if known != cache.manifest_sha256:
        raise SpecMismatch(
            f"{cache.path} is not the cache that was verified",
            [Mismatch("manifest", cache.manifest_sha256, known)],
            f"Verify it: dvc repro verify@{cache.path.name}",
        )
    refuse_task(f"runs.{name}", cache.identity.spec.task, student.kind)
    refuse_recipe(f"runs.{name}", cache.identity.spec.task, recipe)
    if student.kind == "llama" and student.tokenizer != "teacher":
        raise ConfigError(
            f"the student of runs.{name} has a tokenizer of its own ({student.tokenizer} entries), but "
            "learns to expect the teacher's tokens.\nWrite tokenizer: teacher."
        )
    if recipe.pool and not len(rows.select(POOL)):
        raise DataError(
            f"runs.{name}: its recipe trains on the pool, and the dataset has none.\n"
            "Add a pool under datasets, or choose a recipe with pool: false."
        )
    if recipe.alpha < 1:
        refuse_truncated(f"runs.{name}", cache.codec, recipe.divergence, recipe.temperature)
        if cache.identity.spec.per_position and recipe.temperature != 1:
            raise SpecMismatch(
                f"the cache does not fit runs.{name}",
                [Mismatch("recipe.temperature", recipe.temperature, 1)],
                "The loss of a language model's head has no temperature. Write temperature: 1.",
            )
    wanted = rows.row_ids.take(rows.select(*SPLITS, *((POOL,) if recipe.pool else ())))
    cache.check(f"runs.{name}", labels=rows.label_names, row_ids=wanted)


def _refuse_start(name: str, cache: Cache, student: kinds.Student) -> None:
    if isinstance(student, kinds.Llama) and student.init:
        refuse_misfit(f"the student of runs.{name}", student, cache.weights_dir, cache.weights_layers)


def _seed_record(job: Job, done: "Trained") -> dict[str, Any]:
    return {
        "seed": job.seed,
        "teacher_rows_seen": 0 if job.recipe.alpha == 1 else done.rows_seen,
        "cut_rows": done.cut_rows,
        **done.setup,
        **done.fit._asdict(),
    }


def _side_by_side(name: str, jobs: list[Job], at_once: int) -> list["Trained"]:
    """Train the seeds, `at_once` in processes side by side, with a bar each. The first error ends all."""
    waiting = list(reversed(jobs))
    running: dict[Connection[Any, Any], tuple[Job, BaseProcess]] = {}
    trained: dict[int, Trained] = {}
    advance: dict[int, Callable[[int], None]] = {}
    with bars("targets") as add:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    pipe, process = _start(waiting[-1])
                    running[pipe] = waiting.pop(), process
                ready = set(wait(list(running)))
                for pipe in [pipe for pipe in running if pipe in ready]:
                    job, process = running[pipe]
                    news = _hear(name, job, pipe)
                    if not isinstance(news, int):
                        trained[job.seed] = news
                        del running[pipe]
                        process.join()
                    elif job.seed in advance:
                        advance[job.seed](news)
                    else:  # the first number is that of all its rows
                        advance[job.seed] = add(f"training {name}, seed {job.seed}", news)
        finally:
            for _, process in running.values():
                process.terminate()
                process.join()
    fits = [done.fit for done in trained.values()]
    accuracy = sum(done.best_accuracy for done in fits) / len(fits)
    loss = sum(done.best_loss for done in fits) / len(fits)
    seconds = sum(done.seconds for done in fits) / len(fits)
    log(
        f"{name}: validation accuracy {accuracy:.3f}, loss {loss:.3f} over {len(fits)} seeds, "
        f"{seconds:.0f} core-seconds each"
    )
    return [trained[job.seed] for job in jobs]


def _start_importing() -> None:
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
            f"runs.{name}, seed {job.seed}: its process ended without a word (see above).\n"
            "If memory was short, lower workers.seeds_at_once."
        ) from None
    if not isinstance(news, _Failure):
        return news
    where = RuntimeError(f"in the process of seed {job.seed}:\n{news.traceback}")
    if isinstance(news.error, TrainingError):
        raise TrainingError(f"runs.{name}, seed {job.seed}: {news.error}") from where
    raise news.error from where
