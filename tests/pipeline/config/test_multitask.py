"""Runs of several tasks in params.yaml: what they are to other stages, and each fault that is refused."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_params
from storage.errors import ConfigError
from tests import toy


def shelves() -> dict[str, Any]:
    """A params.yaml with a run of two tasks of one cache."""
    made = toy.params()
    task = {"run": "both", "dataset": "toy", "cache": "toy"}
    made["tasks"] = {"hard": {**task, "recipe": "ce"}, "soft": {**task, "recipe": "kd-pool"}}
    made["multitask"] = {"both": {"student": "fc", "weights": {"hard": 1.0, "soft": 2.0}, "seeds": [0, 1]}}
    return made


def test_tasks_are_asked_for_as_runs_are(tmp_path: Path) -> None:
    toy.write_params(tmp_path, shelves())
    found = load_params(tmp_path / "params.yaml")
    assert set(found.everything_trained) - set(found.every_run) == {"hard", "soft"}
    task = found.everything_trained["soft"]
    assert (task.student, task.seeds, task.recipe) == ("fc", (0, 1), "kd-pool")


@pytest.mark.parametrize(
    ("shelf", "name", "changes", "line"),
    [
        ("multitask", "both", {"student": "fcc"}, "multitask.both.student: no 'fcc' in students"),
        ("multitask", "both", {"weights": {"hard": 1.0, "sof": 1.0}}, "weights: no 'sof' in tasks"),
        ("multitask", "both", {"weights": {"hard": 1.0}}, "at least 2 items"),
        ("multitask", "both", {"weights": {"hard": 1.0, "soft": 0.0}}, "multitask.both.weights.soft"),
        ("multitask", "both", {"student": "llama"}, "multitask.both.student: found kind llama"),
        ("multitask", "both", {"student": "mlp"}, "multitask.both.student: found kind mlp"),
        ("multitask", "both", {"student": "svd"}, "multitask.both.student: its init copies weights"),
        ("tasks", "hard", {"run": "bot"}, "tasks.hard.run: no 'bot' in multitask; did you mean 'both'?"),
        ("tasks", "hard", {"dataset": "ty"}, "tasks.hard.dataset: no 'ty'"),
        ("tasks", "hard", {"cache": "ty"}, "tasks.hard.cache: no 'ty'"),
        ("tasks", "hard", {"recipe": "c"}, "tasks.hard.recipe: no 'c'"),
        ("tasks", "hard", {"recipe": "long"}, "tasks.soft.recipe: epochs is 2, but 7 in hard"),
        ("tasks", "hard", {"recipe": "many"}, "tasks.hard.recipe: has candidates (alpha)"),
        ("tasks", "hard", {"recipe": "states"}, "tasks.hard.recipe: match is for runs of one task"),
        ("tasks", "fc-ce", {"run": "both", "dataset": "toy", "cache": "toy", "recipe": "ce"},
         "tasks.fc-ce: runs has this name too"),
        ("tasks", "third", {"run": "both", "dataset": "toy", "cache": "toy", "recipe": "ce"},
         "multitask.both.weights: found ['hard', 'soft'], expected a weight for each of the tasks that name "
         "this run: ['hard', 'soft', 'third']"),
        ("multitask", "soft", {"student": "fc", "weights": {"hard": 1.0, "soft": 1.0}},
         "multitask.soft: tasks has this name too"),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_learned_together_are_refused(
    tmp_path: Path, shelf: str, name: str, changes: dict[str, Any], line: str
) -> None:
    made = shelves()
    made["students"] |= {"llama": {"kind": "llama"}, "mlp": {"kind": "mlp"}}
    made["students"]["svd"] = {"kind": "fc", "init": {"embeddings": "svd"}}
    ce = made["recipes"]["ce"]
    made["recipes"] |= {"long": {**ce, "epochs": 7}, "many": {**ce, "alpha": [0.2, 1.0]}}
    made["recipes"]["states"] = {**ce, "match": {"states": {}}}
    made[shelf][name] = {**made[shelf].get(name, {}), **changes}
    toy.write_params(tmp_path, made)
    with pytest.raises(ConfigError) as refused:
        load_params(tmp_path / "params.yaml")
    assert line in str(refused.value)
