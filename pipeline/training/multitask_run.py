"""The train-tasks stage: a run of several tasks is one student on several caches, over several seeds.

Its directory is that of any run; training.json also has `tasks`: for each its recipe's family, its weight,
and a record of its seeds like the record of a run of its own. Only the processes of the seeds import torch.
"""

import shutil
from pathlib import Path
from typing import Any

from pipeline.config.params import Multitask, Workers
from pipeline.config.students import Student
from pipeline.runtime import hardware
from pipeline.runtime.files import write_json
from pipeline.streaming.verified import open_inputs
from pipeline.training.checks import check_run, check_same_tokenizer
from pipeline.training.job import RECORD, Job, TaskPart, TrainedSeed, seed_record
from pipeline.training.processes import start_importing, train_side_by_side
from pipeline.training.run import log_results, write_student_tokenizer
from pipeline.training.selection import judged_by
from storage.errors import ConfigError

SEVERAL = ", several tasks"  # a task that is learned with others is a family of its own


def train_multitask(
    name: str,
    entry: Multitask,
    student: Student,
    parts: dict[str, TaskPart],
    workers: Workers,
    out: Path,
) -> dict[str, Any]:
    """Train every seed of a run of several tasks and write its directory; return the content of
    training.json.

    `parts` are its tasks by name. Refuses caches that were not verified or do not fit, before the first step.
    A killed run continues from its checkpoints, as in run.train_run.
    """
    if (num_ranks := hardware.ranks()[1]) > 1:
        raise ConfigError(
            f"multitask.{name}: found {num_ranks} processes, expected one: several tasks train in one.\n"
            f"Run python -m stages.train_tasks {name}"
        )
    start_importing()
    opened = {task: open_inputs(part.paths) for task, part in parts.items()}
    for task, (cache, rows) in opened.items():
        check_run(task, cache, rows, student, parts[task].recipe, parts[task].paths.verified)
    check_same_tokenizer(name, {task: cache for task, (cache, _) in opened.items()}, student)
    shutil.rmtree(out, ignore_errors=True)
    (cache, rows), *others = opened.values()
    write_student_tokenizer(student, cache, rows, out / "tokenizer", others=[rows for _, rows in others])
    first = next(iter(parts.values()))
    job = Job(
        entry.seeds[0], 1, student, first.recipe, first.paths, None, workers.readers,
        workers.checkpoint_minutes, parts,
    )  # fmt: skip
    jobs = [job._replace(seed=seed) for seed in entry.seeds]
    trained = train_side_by_side(name, jobs, workers.seeds_at_once)
    log_results(name, trained)
    record = _record(parts, jobs, trained)
    write_json(record, out / RECORD)
    if first.paths.checkpoints:
        shutil.rmtree(first.paths.checkpoints, ignore_errors=True)
    return record


def _record(parts: dict[str, TaskPart], jobs: list[Job], trained: list[TrainedSeed]) -> dict[str, Any]:
    """The content of training.json."""
    seeds = [seed_record(job, done) for job, done in zip(jobs, trained, strict=True)]
    rule = judged_by(trained[0].by_loss)
    record: dict[str, Any] = {"tasks": {}, "judged_by": rule, "seeds": seeds}
    by_task = [seed.pop("tasks") for seed in seeds]
    for task, part in parts.items():
        record["tasks"][task] = {
            "family": part.recipe.family + SEVERAL,
            "weight": part.weight,
            "judged_by": rule,
            "seeds": [
                {"seed": seed["seed"], "seconds": seed["seconds"], **own[task]}
                for seed, own in zip(seeds, by_task, strict=True)
            ],
        }
    return record
