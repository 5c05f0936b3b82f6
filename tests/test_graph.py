"""dvc.yaml: its paths are the code's; cheap stages depend on the rooms that they import, others do not."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.config.params import ChainedRun, Params, Run, TaskRun
from stages import main, paths
from stages.commands.run import LAST_STAGES
from tests.imports import ROOMS, ROOT, closure

# Stages that run the code of another one: for chained runs, and for the tasks of multi-task runs.
SAME_CODE = {
    "train-after": "train", "evaluate-after": "evaluate", "export-after": "export",
    "evaluate-tasks": "evaluate", "export-tasks": "export",
}  # fmt: skip
PACKAGES = ("pipeline/__init__.py", "stages/__init__.py")
CHEAP = (
    "check",
    "prepare",
    "augment",
    "mix",
    "task",
    "train",
    "train-tasks",
    "evaluate",
    "export",
    "report",
    *SAME_CODE,
)
EXPENSIVE = ("fetch", "teacher", "cache", "verify", "receive", "score")
FILE: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())
GRAPH: dict[str, Any] = FILE["stages"]


def module(stage: str) -> str:
    """The file of stages/ that a stage runs."""
    return f"stages.{SAME_CODE.get(stage, stage).replace('-', '_')}"


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


@pytest.mark.parametrize("stage", EXPENSIVE)
def test_an_expensive_stage_depends_on_no_code_but_the_capture_version(stage: str) -> None:
    code = {dep for dep in names(stage, "deps") if dep.startswith(("pipeline/", "stages/", "storage/"))}
    assert code <= {"pipeline/CAPTURE_VERSION"}


def test_every_stage_is_either_cheap_or_expensive_and_none_depends_on_workers() -> None:
    assert set(GRAPH) == {*CHEAP, *EXPENSIVE}
    assert "workers" not in (ROOT / "dvc.yaml").read_text().replace("dvc.yaml", "")


def test_a_section_that_params_leaves_out_is_empty_in_the_graph_and_in_the_code() -> None:
    defaults = {name: value for item in FILE["vars"] for name, value in item.items()}
    assert {f"${{{name}}}" for name in defaults} == {s["foreach"] for s in GRAPH.values() if "foreach" in s}
    assert all(value == {} == getattr(Params(), name) for name, value in defaults.items())
    for stage in GRAPH:  # DVC fails where a stage's params are missing: an entry's own are not
        assert all("${" in param for param in names(stage, "params")), stage


def test_exports_depend_on_the_limits_that_check_writes() -> None:
    assert names("check", "outs") == [str(paths.LIMITS)]
    assert "params.yaml" in names("check", "deps")
    for stage in ("export", "export-after", "export-tasks"):
        assert str(paths.LIMITS) in names(stage, "deps")


def test_the_command_has_every_stage_and_runs_all_stages_of_an_entry() -> None:
    assert {*main.STAGES} == {*GRAPH} - {*SAME_CODE}
    for section, last in LAST_STAGES.items():
        needed = {dep for stage in last for dep in names(stage, "deps")}
        for stage in (s for s in GRAPH if GRAPH[s].get("foreach") == f"${{{section}}}" and s not in last):
            assert {*names(stage, "outs")} & needed or stage == "task", stage  # tasks: through their run
    assert {f"${{{section}}}" for section in (*LAST_STAGES, "multitask")} == {
        stage["foreach"] for stage in GRAPH.values() if "foreach" in stage
    }


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
