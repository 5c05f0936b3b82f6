"""Runs of several tasks under real DVC: as many tasks as there are, and again where one of them changes."""

import json
from typing import Any

from tests import toy
from tests.stages.conftest import Project


def test_a_run_of_several_tasks_runs_again_where_any_of_them_changes_and_only_there(project: Project) -> None:
    base = toy.params()
    task = {"run": "all", "dataset": "toy", "cache": "toy"}
    tasks: dict[str, Any] = {
        "hard": {**task, "recipe": "ce"},
        "soft": {**task, "recipe": "kd"},
        "third": {**task, "cache": "third", "recipe": "kd-third"},
    }
    kd = {**base["recipes"]["ce"], "alpha": 0.5}
    shelves: dict[str, Any] = {
        "caches": base["caches"] | {"third": {"dataset": "toy", "teacher": "tiny", "shard_rows": 32}},
        "recipes": base["recipes"] | {"kd": kd, "kd-third": kd},
        "multitask": {"all": {"student": "fc", "weights": dict.fromkeys(tasks, 1.0)}},
        "tasks": tasks,
    }
    project.params(**shelves)
    made = {"cache@third", "verify@third", *(f"task@{name}" for name in tasks), "train-tasks@all"}
    assert project.repro("evaluate-tasks@third").stages == {*made, "evaluate-tasks@third"}
    record = json.loads((project.root / "models" / "all" / "training.json").read_text())
    assert set(record["tasks"]) == set(tasks)
    found = json.loads((project.root / "results" / "eval" / "third.json").read_text())
    assert (found["about"]["run"], found["about"]["cache"]) == ("all", "third")

    def again() -> set[str]:
        return project.repro("train-tasks@all").stages

    shelves["recipes"]["kd-third"] = {**kd, "alpha": 0.25}
    project.params(**shelves)
    assert again() == {"task@third", "train-tasks@all"}
    assert again() == set()
    del tasks["soft"], shelves["multitask"]["all"]["weights"]["soft"]
    shelves["caches"]["lonely"] = base["caches"]["toy"] | {"hidden": {"layers": [2]}}
    project.params(**shelves)
    assert again() == {"train-tasks@all"}, "a task less; and nobody waits for a cache that no task names"
