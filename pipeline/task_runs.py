"""The train-tasks stage: a run of several tasks is one student on several caches, over several seeds.

Its directory is that of any run; training.json has besides `tasks`: for each its recipe's family, its
weight, and a record of its seeds like that of a run of its own. torch is imported by the processes of the
seeds alone.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import config_tasks, kinds, runs
from storage import Cache
from storage.errors import Mismatch, SpecMismatch

SEVERAL = ", several tasks"  # what is learned beside others is a family of its own


def train(
    name: str,
    entry: config_tasks.Multitask,
    student: kinds.Student,
    parts: dict[str, runs.Part],
    seeds_at_once: int | None,
    out: Path,
) -> dict[str, Any]:
    """Train every seed of a run of several tasks and write its directory; return the content of
    training.json.

    `parts` are its tasks by name. Refuses caches that were not verified or do not fit, before the first step.
    """
    runs.start_importing()
    opened = {task: runs.open_inputs(part.paths) for task, part in parts.items()}
    for task, (cache, rows) in opened.items():
        part = parts[task]
        runs.refuse_run(task, cache, rows, student, part.recipe, part.paths.verified)
    refuse_apart(name, {task: cache for task, (cache, _) in opened.items()}, student)
    shutil.rmtree(out, ignore_errors=True)
    (cache, rows), *others = opened.values()
    runs.make_reader(student, cache, rows, out / "tokenizer", others=[rows for _, rows in others])
    first = next(iter(parts.values()))
    jobs = [runs.Job(seed, 1, student, first.recipe, first.paths, parts=parts) for seed in entry.seeds]
    trained = runs.side_by_side(name, jobs, seeds_at_once)
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
    runs.write_json(record, out / runs.RECORD)
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
