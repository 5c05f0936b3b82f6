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

import numpy as np

from pipeline import by_config, choosing, config, config_recipes, encoders, hardware, kinds, layer_maps
from pipeline.data import POOL, SPLITS, VIEWS, Rows, load_rows
from pipeline.decoders import refuse_misfit
from pipeline.mixing import refuse_unverified
from pipeline.progress import bars, log
from pipeline.schedules import ends
from pipeline.targets import refuse_recipe, refuse_task, refuse_truncated
from pipeline.tokens import TextReader
from storage import Cache
from storage.errors import ConfigError, DataError, Mismatch, SpecMismatch, TrainingError
from storage.mixture import Mixture, open_cache

if TYPE_CHECKING:
    from pipeline.seeds import Trained

PROGRESS_SECONDS = 0.5
SEEDS_PER_CORE = 2  # three seeds on two cores end sooner sharing them than in two turns
RECORD = "training.json"
SKIPPED = "skipped"
# Imported once, then forked; all but the first would be imported late by every seed, for two seconds.
PRELOADED = ["pipeline.seeds", "torch._dynamo", "pyarrow.dataset", "pandas"]


class _Failure(NamedTuple):
    """What ended a seed."""

    error: Exception
    traceback: str


class Job(NamedTuple):
    """One training of a run."""

    seed: int
    threads: int  # at most so many
    student: kinds.Student
    recipe: config_recipes.Recipe
    paths: config.RunPaths
    trial: choosing.Trial | None = None  # what it judges; None: a student that is kept

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
) -> dict[str, Any]:
    """Train every seed of a run and write its directory; return the content of training.json.

    Refuses a cache that was not verified or does not fit, before the first step.
    """
    _start_importing()
    cache, rows = open_inputs(paths)
    _refuse_misfit(name, cache, rows, student, recipe, paths.verified)
    _refuse_start(name, cache, student, paths.init)
    if paths.out.exists():
        shutil.rmtree(paths.out)
    make_reader(student, cache, rows, paths.out / "tokenizer", paths.init)
    record: dict[str, Any] = {"family": recipe.family}
    if skipped := len(rows.select(SKIPPED)):
        record["skipped_rows"] = skipped
        log(f"{name}: {skipped:,} rows are left out, because a cache lacks them")
    if recipe.grid:
        job = Job(run.seeds[0], 1, student, recipe, paths)
        recipe, record["choice"] = _choose(name, rows, job, seeds_at_once)
    jobs = [Job(seed, 1, student, recipe, paths) for seed in run.seeds]
    trained = _side_by_side(name, jobs, seeds_at_once)
    _tell(name, trained)
    record["seeds"] = [_seed_record(job, done) for job, done in zip(jobs, trained, strict=True)]
    write_json(record, paths.out / RECORD)
    return record


def make_reader(
    student: kinds.Student, cache: Cache, rows: Rows, directory: Path, init: Path | None = None
) -> None:
    """Put what the student reads with into `directory`: the cache's tokenizer, or one learned from the text.

    A learned one sees the training and pool text of the dataset, never validation or test. A student that
    starts from that of another run reads as that does.
    """
    if isinstance(student, kinds.MLP):
        directory.parent.mkdir(parents=True)  # images are read without one
    elif init:
        shutil.copytree(init / "tokenizer", directory)
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
    refuse_unverified(cache, verified)
    refuse_task(f"runs.{name}", cache.identity.spec.task, student.kind)
    refuse_recipe(f"runs.{name}", cache.identity.spec.task, recipe)
    if student.kind == "llama" and student.tokenizer != "teacher":
        raise ConfigError(
            f"the student of runs.{name} has a tokenizer of its own ({student.tokenizer} entries), but "
            "learns to expect the teacher's tokens.\nWrite tokenizer: teacher."
        )
    if recipe.pseudo_labels and cache.identity.spec.per_position:
        raise ConfigError(
            f"runs.{name}: its recipe gives the pool pseudo-labels, and text that is to be continued has "
            "labels of its own, the next tokens.\nWrite pseudo_labels: false."
        )
    if recipe.pool and not len(rows.select(POOL)):
        raise DataError(
            f"runs.{name}: its recipe trains on the pool, and the dataset has none.\n"
            "Add a pool under datasets, or choose a recipe with pool: false."
        )
    if recipe.match:
        layer_maps.resolve(f"runs.{name}", recipe.match, student, cache.identity.spec.hidden)
    for one in [recipe.chosen(values) for values in recipe.grid] or [recipe]:
        if not one.predicts or min(ends(one.alpha)) == 1:
            continue
        refuse_truncated(f"runs.{name}", cache.codec, one.divergence, one.temperature)
        if cache.identity.spec.per_position and any(end != 1 for end in ends(one.temperature)):
            raise SpecMismatch(
                f"the cache does not fit runs.{name}",
                [Mismatch("recipe.temperature", one.temperature, 1)],
                "The loss of a language model's head has no temperature. Write temperature: 1.",
            )
    if not len(rows.select("train")):
        raise DataError(
            f"runs.{name}: no row to train on is in all caches of {cache.path.parent}.\n"
            "Mix caches of the same dataset: row ids are made of a dataset's name and its texts."
        )
    there = 0 if rows.views is None else int(rows.views.max())
    if recipe.views > there:
        raise DataError(
            f"runs.{name}: its recipe trains on {recipe.views} views of each training row, and the dataset "
            f"has {there}.\nMake more of them (augmented.NAME.views), or lower the recipe's views."
        )
    rows = rows.with_views(recipe.views, recipe.view_labels)
    wanted = rows.row_ids.take(rows.select(*SPLITS, VIEWS, *((POOL,) if recipe.pool else ())))
    cache.check(f"runs.{name}", labels=rows.label_names, row_ids=wanted)


def start_of(init: Path, seed: int) -> Path:
    """The student of a trained run that this seed starts from: that of the same seed, or its only one."""
    own = init / f"seed-{seed}"
    return own if own.is_dir() else next(init.glob("seed-*"))


def _refuse_start(name: str, cache: Cache, student: kinds.Student, init: Path | None) -> None:
    if isinstance(student, kinds.Transformers):
        by_config.settings(student, 2, len(cache.labels))
    if init:
        _refuse_other_run(name, cache, student, init)
    elif (
        isinstance(student, kinds.FC | kinds.BiLSTM | kinds.TinyBERT)
        and student.init
        and student.init.from_teacher
    ):
        what, held = f"the student of runs.{name}", cache.weights_dir
        encoders.refuse_misfit(what, student, held, cache.weights_layers)
    elif isinstance(student, kinds.Llama) and student.init:
        refuse_misfit(f"the student of runs.{name}", student, cache.weights_dir, cache.weights_layers)


def _refuse_other_run(name: str, cache: Cache, student: kinds.Student, init: Path) -> None:
    """Raise SpecMismatch where the students of the run before are not those that this run trains on."""
    facts = json.loads((next(init.glob("seed-*")) / "student.json").read_text())
    sizes = {"student": student.model_dump(mode="json"), "num_labels": cache.identity.spec.num_outputs}
    wrong = [Mismatch(key, facts[key], wanted) for key, wanted in sizes.items() if facts[key] != wanted]
    known = cache.identity.tokenizer
    if known is not None and not isinstance(student, kinds.MLP) and student.tokenizer == "teacher":
        reads = TextReader(init / "tokenizer", student.max_length, "truncate").identity().content
        if reads != known.content:
            wrong.append(Mismatch("tokenizer.content", reads, known.content))
    if wrong:
        raise SpecMismatch(
            f"the students of {init} are no start for chained.{name}", wrong,
            "Chain runs of one student, over caches of one tokenizer and as many classes.",
        )  # fmt: skip


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
    trained = _side_by_side(name, jobs, seeds_at_once)
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


def _seed_record(job: Job, done: "Trained") -> dict[str, Any]:
    start = start_of(job.paths.init, job.seed) if job.paths.init else None
    return {
        "seed": job.seed,
        **({"started_from": f"{start.parent.name}/{start.name}"} if start else {}),
        "teacher_rows_seen": 0 if job.recipe.labels_only else done.rows_seen,
        "cut_rows": done.cut_rows,
        **done.setup,
        **done.fit._asdict(),
    }


def _side_by_side(name: str, jobs: list[Job], seeds_at_once: int | None) -> list["Trained"]:
    """Train the jobs in processes side by side, with a bar each; they share the cores. The first error ends
    all."""
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


def _tell(name: str, trained: list["Trained"]) -> None:
    fits = [done.fit for done in trained]
    accuracy = sum(done.best_accuracy for done in fits) / len(fits)
    loss = sum(done.best_loss for done in fits) / len(fits)
    seconds = sum(done.seconds for done in fits) / len(fits)
    log(
        f"{name}: validation accuracy {accuracy:.3f}, loss {loss:.3f} over {len(fits)} seeds, "
        f"{seconds:.0f} core-seconds each"
    )


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
            f"runs.{name}, {job.label}: its process ended without a word (see above).\n"
            "If memory was short, lower workers.seeds_at_once."
        ) from None
    if not isinstance(news, _Failure):
        return news
    where = RuntimeError(f"in the process of {job.label}:\n{news.traceback}")
    if isinstance(news.error, TrainingError):
        raise TrainingError(f"runs.{name}, {job.label}: {news.error}") from where
    raise news.error from where
