"""The train-tasks stage: a run of several tasks is one student on several caches, over several seeds.

Its directory is that of any run; training.json has besides `tasks`: for each its recipe's family, its
weight, and a record of its seeds like that of a run of its own. torch is imported by the processes of the
seeds alone.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import config, config_tasks, hardware, kinds, runs
from pipeline.run_checks import RECORD, refuse_run
from storage import Cache
from storage.errors import ConfigError, Mismatch, SpecMismatch

SEVERAL = ", several tasks"  # what is learned beside others is a family of its own


def train(
    name: str,
    entry: config_tasks.Multitask,
    student: kinds.Student,
    parts: dict[str, runs.Part],
    workers: config.Workers,
    out: Path,
) -> dict[str, Any]:
    """Train every seed of a run of several tasks and write its directory; return the content of
    training.json.

    `parts` are its tasks by name. Refuses caches that were not verified or do not fit, before the first step.
    A killed one goes on from its checkpoints, as in runs.train.
    """
    if (num_ranks := hardware.ranks()[1]) > 1:
        raise ConfigError(
            f"multitask.{name}: found {num_ranks} processes, expected one: several tasks train in one.\n"
            f"Run python -m stages.train_tasks {name}"
        )
    runs.start_importing()
    opened = {task: runs.open_inputs(part.paths) for task, part in parts.items()}
    for task, (cache, rows) in opened.items():
        part = parts[task]
        refuse_run(task, cache, rows, student, part.recipe, part.paths.verified)
    refuse_apart(name, {task: cache for task, (cache, _) in opened.items()}, student)
    shutil.rmtree(out, ignore_errors=True)
    (cache, rows), *others = opened.values()
    runs.make_reader(student, cache, rows, out / "tokenizer", others=[rows for _, rows in others])
    first = next(iter(parts.values()))
    jobs = [
        runs.Job(
            seed,
            1,
            student,
            first.recipe,
            first.paths,
            None,
            workers.readers,
            workers.checkpoint_minutes,
            parts,
        )
        for seed in entry.seeds
    ]  # fmt: skip
    trained = runs.side_by_side(name, jobs, workers.seeds_at_once)
    runs.tell(name, trained)
    seeds = [runs.seed_record(job, done) for job, done in zip(jobs, trained, strict=True)]
    record: dict[str, Any] = {"tasks": {}, "seeds": seeds}
    own = [seed.pop("tasks") for seed in seeds]
    for task, part in parts.items():
        record["tasks"][task] = {
            "family": part.recipe.family + SEVERAL,
            "weight": part.weight,
            "seeds": [
                {"seed": seed["seed"], "seconds": seed["seconds"], **tasks[task]}
                for seed, tasks in zip(seeds, own, strict=True)
            ],
        }
    runs.write_json(record, out / RECORD)
    if first.paths.checkpoints:
        shutil.rmtree(first.paths.checkpoints, ignore_errors=True)
    return record


def refuse_apart(name: str, caches: Mapping[str, Cache], student: kinds.Student) -> None:
    """Raise SpecMismatch where the student reads with the teachers' tokenizer, and they have several."""
    known = {task: cache.identity.tokenizer for task, cache in caches.items()}
    contents = {task: tokenizer.content for task, tokenizer in known.items() if tokenizer is not None}
    first = next(iter(contents.values()))
    if isinstance(student, kinds.MLP) or student.tokenizer != "teacher" or {*contents.values()} == {first}:
        return
    raise SpecMismatch(
        f"the caches of multitask.{name} come from different tokenizers",
        [
            Mismatch(f"tasks.{task}: tokenizer.content", content, first)
            for task, content in contents.items()
            if content != first
        ],
        "Give the student one of its own, learned from the text of all tasks: tokenizer: 8000.",
    )
