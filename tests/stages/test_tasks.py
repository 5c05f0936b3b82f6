"""Runs of several tasks under real DVC: as many tasks as there are, and again where one of them changes."""

import json
from typing import Any

from tests import toy
from tests.stages.conftest import Project

STAGES = ("task", "evaluate-tasks", "export-tasks")


def test_a_run_of_several_tasks_runs_again_where_any_of_them_changes_and_only_there(project: Project) -> None:
    base = toy.params()
    task = {"run": "all", "dataset": "toy", "cache": "toy"}
    other = {**task, "dataset": "third", "cache": "third"}
    tasks: dict[str, Any] = {
        "hard": {**task, "recipe": "ce"},
        "soft": {**task, "recipe": "kd"},
        "third": {**other, "recipe": "kd-third"},
    }
    kd = {**base["recipes"]["ce"], "alpha": 0.5}
    shelves: dict[str, Any] = {
        "datasets": base["datasets"] | {"third": base["datasets"]["toy"]},
        "caches": base["caches"] | {"third": {"dataset": "third", "teacher": "tiny", "shard_rows": 32}},
        "recipes": base["recipes"] | {"kd": kd, "kd-third": kd},
        "multitask": {"all": {"student": "fc", "weights": dict.fromkeys(tasks, 1.0)}},
        "tasks": tasks,
    }
    project.params(**shelves)
    made = {"prepare@third", "cache@third", "verify@third"}
    whole = {"train-tasks@all", "report", *(f"{stage}@{name}" for stage in STAGES[1:] for name in tasks)}
    assert project.repro().stages == {*made, *whole, *(f"task@{name}" for name in tasks)}
    record = json.loads((project.root / "models" / "all" / "training.json").read_text())
    assert set(record["tasks"]) == set(tasks)
    page = (project.root / "report" / "index.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in page for name in tasks)
    assert project.repro().stages == set()

    def again() -> set[str]:
        return project.repro("train-tasks@all").stages

    shelves["recipes"]["kd-third"] = {**kd, "alpha": 0.25}
    project.params(**shelves)
    assert again() == {"task@third", "train-tasks@all"}
    shelves["caches"]["third"]["hidden"] = {"layers": [1]}
    project.params(**shelves)
    assert again() == {"cache@third", "verify@third", "task@third", "train-tasks@all"}
    del shelves["tasks"]["soft"], shelves["multitask"]["all"]["weights"]["soft"]
    shelves["caches"]["lonely"] = base["caches"]["toy"] | {"hidden": {"layers": [2]}}
    project.params(**shelves)
    assert again() == {"train-tasks@all"}, "a task less; and of a cache that no task names nobody waits"
