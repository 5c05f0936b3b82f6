"""The train stage: a run is one student and one recipe on one cache, over several seeds.

A run's directory: tokenizer/ (what the student reads with), seed-<n>/ (a student, see students.py),
training.json. Seeds train side by side in processes of one thread each: small models gain little from more,
and a result then does not depend on how many run at once. torch is imported by those processes alone.
"""

import csv
import json
import multiprocessing as mp
import shutil
from multiprocessing.pool import AsyncResult
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import config, hardware
from pipeline.data import POOL, SPLITS, Rows, load_rows
from pipeline.progress import bars, log
from pipeline.tokens import TextReader
from storage import Cache
from storage.errors import DataError, Mismatch, SpecMismatch

if TYPE_CHECKING:
    from pipeline.seeds import Trained

PROGRESS_SECONDS = 0.5
SEEDS_PER_CORE = 2  # three seeds on two cores end sooner sharing them than in two turns
RECORD = "training.json"


class Job(NamedTuple):
    """One seed of a run."""

    seed: int
    student: config.Student
    recipe: config.Recipe
    paths: config.RunPaths


def open_inputs(paths: config.RunPaths) -> tuple[Cache, Rows]:
    """The cache and the prepared rows of a run."""
    return Cache.open(paths.cache), load_rows(paths.dataset)


def train(
    name: str,
    run: config.Run,
    student: config.Student,
    recipe: config.Recipe,
    seeds_at_once: int | None,
    paths: config.RunPaths,
) -> dict[str, Any]:
    """Train every seed of a run and write its directory; return the content of training.json.

    Refuses a cache that was not verified or does not fit, before the first step.
    """
    cache, rows = open_inputs(paths)
    _refuse_misfit(name, cache, rows, recipe, paths.verified)
    if paths.out.exists():
        shutil.rmtree(paths.out)
    make_reader(student, cache, rows, paths.out / "tokenizer")
    at_once = min(len(run.seeds), seeds_at_once or SEEDS_PER_CORE * hardware.num_cores())
    jobs = [Job(seed, student, recipe, paths) for seed in run.seeds]
    trained = _side_by_side(name, jobs, at_once)
    record = {"seeds": [_seed_record(job, done) for job, done in zip(jobs, trained, strict=True)]}
    write_json(record, paths.out / RECORD)
    return record


def make_reader(student: config.Student, cache: Cache, rows: Rows, directory: Path) -> None:
    """Put what the student reads with into `directory`: the cache's tokenizer, or one learned from the text.

    A learned one sees the training and pool text of the dataset, never validation or test.
    """
    if student.tokenizer == "teacher":
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


def _refuse_misfit(name: str, cache: Cache, rows: Rows, recipe: config.Recipe, verified: Path) -> None:
    known = json.loads(verified.read_text())["manifest"] if verified.is_file() else "nothing"
    if known != cache.manifest_sha256:
        raise SpecMismatch(
            f"{cache.path} is not the cache that was verified",
            [Mismatch("manifest", cache.manifest_sha256, known)],
            f"Verify it: dvc repro verify@{cache.path.name}",
        )
    if recipe.pool and not len(rows.select(POOL)):
        raise DataError(
            f"runs.{name}: its recipe trains on the pool, and the dataset has none.\n"
            "Add a pool under datasets, or choose a recipe with pool: false."
        )
    wanted = rows.row_ids.take(rows.select(*SPLITS, *((POOL,) if recipe.pool else ())))
    cache.check(f"runs.{name}", labels=rows.label_names, row_ids=wanted)


def _seed_record(job: Job, done: "Trained") -> dict[str, Any]:
    return {
        "seed": job.seed,
        "teacher_rows_seen": 0 if job.recipe.alpha == 1 else done.fit.rows_seen,
        "cut_rows": done.cut_rows,
        **done.fit._asdict(),
    }


def _side_by_side(name: str, jobs: list[Job], at_once: int) -> list["Trained"]:
    """Train the seeds in `at_once` processes, with a bar a seed. The first error ends them all."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.seeds"])  # torch is imported once, then forked
    # Workers look the function up by name, so this process never imports torch.
    with context.Manager() as manager, context.Pool(at_once, maxtasksperchild=1) as pool, bars("rows") as add:
        told = manager.Queue()
        waiting = [pool.apply_async(_train_seed, (job, told)) for job in jobs]
        advance: dict[int, Any] = {}
        while not all(result.ready() for result in waiting):
            _raise_first_error(waiting)
            try:
                seed, rows = told.get(timeout=PROGRESS_SECONDS)
            except Empty:
                continue
            if seed in advance:
                advance[seed](rows)
            else:
                advance[seed] = add(f"training {name}, seed {seed}", rows)
        trained = [result.get() for result in waiting]
    best = sum(done.fit.best_accuracy for done in trained) / len(trained)
    seconds = sum(done.fit.seconds for done in trained) / len(trained)
    log(f"{name}: validation accuracy {best:.3f} over {len(trained)} seeds, {seconds:.0f} core-seconds each")
    return trained


def _train_seed(job: Job, told: Any) -> "Trained":
    from pipeline.seeds import train_seed

    return train_seed(job, told.put, PROGRESS_SECONDS)


def _raise_first_error(results: list[AsyncResult[Any]]) -> None:
    for result in results:
        if result.ready():
            result.get()
