"""The train stage: a run is one student and one recipe on one cache, over several seeds.

A run's directory: tokenizer/ (of the student), seed-<n>/ (a student, see students/registry.py),
training.json. Seeds train side by side in processes of their own. Classifiers have one thread each: small
models gain little from more, and a result then does not depend on how many run at once. Language models share
the cores (autotune.py). torch is imported by those processes alone.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.params import Run, RunInputs, Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student, StudentSection
from pipeline.data.rows import POOL, Rows
from pipeline.data.tokenizer import TextReader
from pipeline.runtime import hardware
from pipeline.runtime.files import write_json
from pipeline.runtime.progress import log
from pipeline.streaming.verified import SKIPPED, open_inputs
from pipeline.training.checks import check_ranks, check_run, check_start
from pipeline.training.cross_validation import (
    CandidateValues,
    FoldScores,
    all_trials,
    best_candidate,
    describe_values,
    hold_out_fold,
)
from pipeline.training.job import RECORD, Job, TrainedSeed, seed_record
from pipeline.training.processes import start_importing, train_side_by_side
from pipeline.training.selection import judged_by
from storage import Cache


def train_run(
    name: str,
    run: Run,
    student: Student,
    recipe: Recipe,
    paths: RunInputs,
    workers: Workers = Workers(),  # noqa: B008 (immutable)
) -> dict[str, Any]:
    """Train every seed of a run and write its directory; return the content of training.json.

    Refuses a cache that was not verified or does not fit, before the first step. Where an earlier process was
    killed, training continues from its checkpoints, which are removed when the run is done. Processes that
    torchrun started train one seed after the other together, and the first of them writes.
    """
    rank, num_ranks = hardware.ranks()
    if num_ranks == 1:
        start_importing()
    else:
        check_ranks(name, recipe, num_ranks)
    cache, rows = open_inputs(paths)
    check_run(name, cache, rows, student, recipe, paths.verified)
    check_start(name, cache, student, paths.init)
    if rank == 0:
        if paths.out.exists():
            shutil.rmtree(paths.out)
        write_student_tokenizer(student, cache, rows, paths.out / "tokenizer", paths.init)
    record: dict[str, Any] = {"family": recipe.family}
    if skipped := len(rows.select(SKIPPED)):
        record["skipped_rows"] = skipped
        log(f"{name}: {skipped:,} rows are left out, because a cache lacks them")
    first = Job(run.seeds[0], 1, student, recipe, paths, None, workers.readers, workers.checkpoint_minutes)
    if recipe.grid:
        recipe, record["choice"] = _choose(name, rows, first, workers.seeds_at_once)
    jobs = [first._replace(seed=seed, recipe=recipe) for seed in run.seeds]
    trained = train_side_by_side(name, jobs, workers.seeds_at_once)
    record["judged_by"] = judged_by(trained[0].by_loss)
    record["seeds"] = [seed_record(job, done) for job, done in zip(jobs, trained, strict=True)]
    if rank == 0:
        log_results(name, trained)
        write_json(record, paths.out / RECORD)
        if paths.checkpoints:
            shutil.rmtree(paths.checkpoints, ignore_errors=True)
    return record


def write_student_tokenizer(
    student: StudentSection, cache: Cache, rows: Rows, directory: Path, init: Path | None = None,
    others: Sequence[Rows] = (),
) -> None:  # fmt: skip
    """Write the student's tokenizer into `directory`: the cache's, or one learned from the text.

    One is learned from the training and pool text of the dataset (and of `others`, those of its other tasks),
    never from validation or test. A student that starts from the student of another run has its tokenizer.
    """
    if student.text is None:
        directory.parent.mkdir(parents=True)  # images are read without a tokenizer
    elif init:
        shutil.copytree(init / "tokenizer", directory)
    elif student.text.tokenizer == "teacher":
        shutil.copytree(cache.tokenizer_dir, directory)
    else:
        learned = [own.texts.take(own.select("train", POOL)).to_pylist() for own in (rows, *others)]
        texts = [text for own in learned for text in own]
        TextReader.learn(texts, student.text.tokenizer, directory, student.text.max_length)


def _choose(name: str, rows: Rows, job: Job, seeds_at_once: int | None) -> tuple[Recipe, dict[str, Any]]:
    """(the best recipe of the job's grid, the record of all candidates): see cross_validation.py."""
    grid, folds = job.recipe.grid, job.recipe.folds
    for fold in range(folds):
        hold_out_fold(rows, fold, folds)  # an empty one is refused before the first step
    log(f"{name}: choosing among {len(grid)} recipes, {folds} trainings each")
    trials = all_trials(job.recipe)
    jobs = [job._replace(recipe=job.recipe.chosen(trial.values), trial=trial) for trial in trials]
    trained = train_side_by_side(name, jobs, seeds_at_once)
    fits = [done.fit for done in trained]
    scores = [
        FoldScores([fit.best_accuracy for fit in own], [fit.best_loss for fit in own])
        for own in (fits[start : start + folds] for start in range(0, len(fits), folds))
    ]
    best = best_candidate(scores, trained[0].by_loss)
    log(f"{name}: chose {describe_values(grid[best])}")
    return job.recipe.chosen(grid[best]), {
        "folds": folds,
        "seed": job.seed,
        "judged_by": judged_by(trained[0].by_loss),
        "seconds": sum(fit.seconds for fit in fits),
        "chosen": _plain(grid[best]),
        "candidates": [
            {"values": _plain(values), "accuracy": fold.score, "loss": fold.loss}
            for values, fold in zip(grid, scores, strict=True)
        ],
    }


def _plain(values: CandidateValues) -> dict[str, Any]:
    return {field: value if isinstance(value, int | float) else str(value) for field, value in values.items()}


def log_results(name: str, trained: list[TrainedSeed]) -> None:
    """Log the mean scores and times of the seeds."""
    fits = [done.fit for done in trained]
    accuracy = sum(done.best_accuracy for done in fits) / len(fits)
    loss = sum(done.best_loss for done in fits) / len(fits)
    seconds = sum(done.seconds for done in fits) / len(fits)
    log(
        f"{name}: validation accuracy {accuracy:.3f}, loss {loss:.3f} over {len(fits)} seeds, "
        f"{seconds:.0f} core-seconds each"
    )
