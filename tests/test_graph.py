"""dvc.yaml: its paths are the code's, cheap stages depend on the code that they run, dear ones do not."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.config.params import ChainedRun, Run, TaskRun
from stages import paths
from tests.imports import ROOMS, ROOT, closure

# Stages that run the code of another one: for chained runs, and for the tasks of runs that learn several.
AGAIN = {
    "train-after": "train", "evaluate-after": "evaluate", "export-after": "export",
    "evaluate-tasks": "evaluate", "export-tasks": "export",
}  # fmt: skip
PACKAGES = ("pipeline/__init__.py", "stages/__init__.py")
CHEAP = ("prepare", "augment", "mix", "task", "train", "train-tasks", "evaluate", "export", "report", *AGAIN)
DEAR = ("fetch", "teacher", "cache", "verify", "receive", "score")
GRAPH: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]


def module(stage: str) -> str:
    """The file of stages/ that a stage runs."""
    return f"stages.{AGAIN.get(stage, stage).replace('-', '_')}"


def body(stage: str) -> dict[str, Any]:
    """A stage's fields, inside foreach or not."""
    found: dict[str, Any] = GRAPH[stage].get("do", GRAPH[stage])
    return found


def names(stage: str, *fields: str) -> list[str]:
    """The paths below these fields, without their options."""
    return [
        next(iter(item)) if isinstance(item, dict) else item
        for f in fields
        for item in body(stage).get(f, [])
    ]


def rooms(module_name: str) -> set[str]:
    """What a stage lists for its imports: rooms of pipeline, storage as a whole, files of stages."""
    found = set()
    for path in closure(module_name):
        top, *rest = path.split("/")
        if top == "storage":
            found.add(top)
        elif path not in PACKAGES:
            found.add(f"{top}/{rest[0]}")
    return found


@pytest.mark.parametrize("stage", CHEAP)
def test_a_cheap_stage_depends_on_exactly_the_rooms_that_it_imports(stage: str) -> None:
    expected = rooms(module(stage))
    found = {dep for dep in names(stage, "deps") if dep.split("/")[0] in ROOMS}
    assert found == expected, f"deps of {stage}: {', '.join(sorted(expected))}"


def test_packages_that_no_stage_lists_hold_a_docstring_alone() -> None:
    for path in PACKAGES:
        assert len(ast.parse((ROOT / path).read_text()).body) == 1, path


@pytest.mark.parametrize("stage", DEAR)
def test_a_dear_stage_depends_on_no_code_but_the_capture_version(stage: str) -> None:
    code = {dep for dep in names(stage, "deps") if dep.startswith(("pipeline/", "stages/", "storage/"))}
    assert code <= {"pipeline/CAPTURE_VERSION"}


def test_every_stage_is_either_cheap_or_dear_and_none_depends_on_workers() -> None:
    assert set(GRAPH) == {*CHEAP, *DEAR}
    assert "workers" not in (ROOT / "dvc.yaml").read_text().replace("dvc.yaml", "")


def test_the_graph_and_the_code_name_the_same_paths() -> None:
    key = "${key}"
    assert names("fetch", "outs") == [str(paths.ASSETS / key)]
    assert names("prepare", "outs") == [str(paths.DATA / key)]
    assert names("augment", "outs") == [str(paths.DATA / key)]
    assert names("teacher", "outs") == [str(paths.TEACHERS / key)]
    assert names("cache", "outs") == [str(paths.CACHES / key), str(paths.CAPTURE / f"{key}.json")]
    assert names("verify", "outs") == [str(paths.VERIFIED / f"{key}.json")]
    assert names("receive", "outs") == names("mix", "outs")
    assert names("mix", "outs") == [str(paths.CACHES / key), str(paths.VERIFIED / f"{key}.json")]
    assert names("train", "outs", "plots") == [str(paths.MODELS / key), str(paths.CURVES / f"{key}.csv")]
    assert names("evaluate", "metrics") == [str(paths.EVAL / f"{key}.json")]
    assert names("export", "outs") == [str(paths.EXPORTED / key)]
    assert names("export", "metrics") == [str(paths.EXPORT / f"{key}.json")]
    assert names("score", "metrics") == [str(paths.EVAL / f"teacher-{key}.json")]
    assert names("report", "outs") == [str(paths.REPORT.parent)]
    run = paths.of_run(key, Run(dataset="d", cache="c", student="s", recipe="r"))
    assert Path(names("train", "outs")[0]) == run.out
    for place in (0, 1):
        member = f"${{item.caches[{place}]}}"
        assert {str(paths.CACHES / member), str(paths.VERIFIED / f"{member}.json")} <= {*names("mix", "deps")}
    reads = names("train", "deps")
    item = {"d": "${item.dataset}", "c": "${item.cache}"}
    assert str(paths.DATA / item["d"]) in reads
    assert str(paths.CACHES / item["c"]) in reads
    assert str(paths.VERIFIED / f"{item['c']}.json") in reads


def test_chained_runs_depend_on_the_run_before_and_are_runs_otherwise() -> None:
    chained = ChainedRun(dataset="d", cache="c", student="s", recipe="r", init="before")
    assert str(paths.of_run("after", chained).init) == str(paths.MODELS / "before")
    differing = {"models/${item.init}"}
    assert set(names("train-after", "deps")) == {*names("train", "deps"), *differing}
    assert names("train-after", "outs", "plots") == names("train", "outs", "plots")
    assert body("train-after")["params"] == [p.replace("runs.", "chained.") for p in body("train")["params"]]
    assert body("evaluate-after") == body("evaluate")


def test_runs_of_several_tasks_depend_on_what_their_tasks_learn_from_and_tasks_on_their_run() -> None:
    task = TaskRun(dataset="d", cache="c", student="s", recipe="r", run="several")
    own = paths.of_run("task", task)
    assert (own.out, own.task) == (paths.MODELS / "several", "task")
    assert names("task", "outs") == [str(paths.TASKS / "${item.run}" / "${key}.json")]
    assert str(paths.TASKS / "${key}") in names("train-tasks", "deps")
    assert body("task")["params"] == ["tasks.${key}", "recipes.${item.recipe}"]
    read = {"caches/${item.cache}", "verified/${item.cache}.json", "data/${item.dataset}"}
    assert read <= {*names("task", "deps")}
    assert names("train-tasks", "outs", "plots") == names("train", "outs", "plots")
    for again, first in (("evaluate-tasks", "evaluate"), ("export-tasks", "export")):
        found = {*names(again, "deps")}
        assert found ^ {*names(first, "deps")} == {"models/${item.run}", "models/${key}"}
        assert {**body(again), "deps": None} == {**body(first), "deps": None}


def test_commands_run_the_stage_that_they_are_named_after() -> None:
    for stage in GRAPH:
        command = f"python -m {module(stage)}"
        assert body(stage)["cmd"] in (command, f"{command} ${{key}}")
