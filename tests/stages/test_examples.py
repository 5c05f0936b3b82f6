"""examples/: one text of the graph in all; each runs, stage by stage, at toy size; one under real DVC."""

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.config.load import load_params
from stages import main
from tests import toy
from tests.stages import small
from tests.stages.conftest import Project

EXAMPLES = toy.ROOT / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/params.yaml"))


@cache
def make_projects() -> Any:
    """The script that writes what examples share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return __import__("make_projects")


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples fetch, at toy size."""
    root = tmp_path_factory.mktemp("examples")
    for name, write in small.SOURCES.items():
        write(root / "sources" / name)
    return root


def start(sources: Path, name: str) -> Path:
    """A copy of an example with small params, next to what it fetches."""
    shutil.copytree(EXAMPLES / name, sources / name)
    toy.write_params(sources / name, small.shrink(read_yaml(EXAMPLES / name / "params.yaml")))
    return sources / name


def test_all_examples_have_the_files_that_the_script_writes() -> None:
    assert len(NAMES) >= 10
    for path, text in make_projects().files().items():
        for name in NAMES:
            assert (EXAMPLES / name / path).read_text() == text, f"{name}/{path}: run `make examples`"


def test_the_graph_of_an_example_is_the_root_s_without_code() -> None:
    root, example = (read_yaml(path / "dvc.yaml")["stages"] for path in (toy.ROOT, EXAMPLES / NAMES[0]))
    assert list(root) == list(example)
    for name in root:
        ours, theirs = (graph[name].get("do", graph[name]) for graph in (root, example))
        assert theirs["cmd"].split()[0] == "stillroom"
        code = ("pipeline", "stages", "storage")
        kept = [dep for dep in ours.get("deps", []) if not dep.startswith(code)]
        assert theirs.get("deps", []) == kept
        assert {**ours, "cmd": "", "deps": []} == {**theirs, "cmd": "", "deps": []}


def test_each_example_has_a_page_that_says_how_to_run_it() -> None:
    for name in NAMES:
        page = (EXAMPLES / name / "README.md").read_text()
        assert f"make example NAME={name} " in page
        assert page.count("\n") <= 40
        assert "Time: " in page
        params = load_params(EXAMPLES / name / "params.yaml")
        assert (EXAMPLES / name / "params.yaml").read_text().startswith("# ")
        assert params.datasets


def commands(params: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(command, outputs) of every stage of the graph, in an order in which they can run."""
    order = (
        "check", "fetch", "prepare", "augment", "teacher", "score", "cache", "verify", "mix", "task", "train",
        "train-after", "train-tasks", "evaluate", "evaluate-after", "evaluate-tasks", "export",
        "export-after", "export-tasks", "report",
    )  # fmt: skip
    graph = read_yaml(EXAMPLES / NAMES[0] / "dvc.yaml")["stages"]
    assert {*order} == {*graph} - {"receive"}
    for stage in order:
        body = graph[stage].get("do", graph[stage])
        outputs = [next(iter(o)) if isinstance(o, dict) else o
                   for field in ("outs", "metrics", "plots") for o in body.get(field, [])]  # fmt: skip
        section = graph[stage].get("foreach", "")[2:-1]
        entries = params.get(section, {}) if section else {"": {}}
        for name, entry in entries.items():
            filled = [
                text.replace("${key}", name).replace("${item.run}", entry.get("run", ""))
                for text in (body["cmd"], *outputs)
            ]
            yield filled[0], filled[1:]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_at_toy_size(
    sources: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = start(sources, name)
    monkeypatch.chdir(root)
    monkeypatch.setattr(multiprocessing.process, "ORIGINAL_DIR", str(root))  # where seeds' processes start
    for command, outputs in commands(read_yaml(root / "params.yaml")):
        words = command.split()
        if words[1] == "export":  # torch exports one student with an LSTM a process
            done = Project(root).run("python", "-m", "stages.main", *words[1:], check=False)
            code, errors = done.returncode, done.stderr
        else:
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as end:
                main.main()
            code, errors = end.value.code, capsys.readouterr().err
        assert not code, f"{command}\n{errors}"
        assert all((root / output).exists() for output in outputs), command


def test_an_example_is_a_repository_of_dvc_within_the_root_s_and_shares_its_cache(
    fresh: Callable[..., Project], sources: Path, tmp_path: Path
) -> None:
    root = fresh()
    shutil.copytree(EXAMPLES / "digits", root.root / "examples" / "digits")
    (root.root / "examples" / "sources").symlink_to(sources / "sources")
    project = Project(root.root / "examples" / "digits")
    small_params = small.shrink(read_yaml(project.root / "params.yaml"))
    toy.write_params(project.root, {name: small_params[name] for name in small_params if name != "export"})
    command = tmp_path / "bin" / "stillroom"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nexec python -m stages.main "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    done = project.run("stillroom", "run", "digits-kd", PATH=path)
    ran = {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}
    assert {"fetch@digits", "train@digits-kd", "export@digits-kd", "report"} <= ran
    assert list((root.root / ".dvc" / "cache" / "files").rglob("*"))
    assert not (project.root / ".dvc" / "cache").exists()
    assert project.run("dvc", "status", "train@digits-kd").stdout.count("up to date") == 1
    listed = root.run("dvc", "stage", "list", "--all", "--name-only").stdout
    assert "toy" in listed
    assert "digits" not in listed
