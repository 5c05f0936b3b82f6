"""The command `stillroom`: stages by name, `run` by names of entries, and what it says of names it lacks."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_params
from stages import cli, main
from stages.commands import run
from storage.errors import ConfigError
from tests import toy
from tests.stages.conftest import Project


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run `stillroom` in this process; returns its exit code or message."""
    monkeypatch.setattr(sys, "argv", ["stillroom", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code


def test_help_has_a_line_for_each_command_and_imports_no_library() -> None:
    code = (
        "import sys; from stages.main import main; sys.argv = ['stillroom', '--help']; main()\n"
        "assert not {'typer', 'pydantic', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=toy.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert {*main.STAGES, *main.BY_HAND} == {*lines}
    assert all(len(line.split()) > 4 and len(line) <= 110 for line in lines.values())


def test_an_unknown_command_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "trian", "fc-ce") == 2
    assert "no command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_a_stage_is_a_command_and_a_library_that_is_missing_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    toy.write_params(tmp_path, toy.params())
    assert command(monkeypatch, "check") == 0
    assert (tmp_path / "results" / "limits.json").read_text() == '{\n  "int8_max_loss": 100.0\n}\n'
    assert command(monkeypatch, "prepare", "tpy") == 1
    assert "no 'tpy' in datasets of params.yaml; did you mean 'toy'?" in capsys.readouterr().err

    def lacking() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(sys, "argv", ["stillroom"])
    with pytest.raises(SystemExit) as end:
        cli.run(lacking)
    assert end.value.code == "torch is not installed: pip install 'stillroom[pipeline]'"


@pytest.mark.parametrize("stage", main.STAGES)
def test_every_stage_checks_params_first(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    toy.write_params(tmp_path, toy.params(workers={"raeders": 1}))
    assert command(monkeypatch, stage, *(() if stage in main.WITHOUT_NAME else ("toy",))) == 1
    assert "workers.raeders: unknown key; did you mean 'readers'?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def several_tasks() -> dict[str, Any]:
    """The toy's params with a chained run and a run of two tasks."""
    base = toy.params()
    task = {"run": "both", "dataset": "toy", "cache": "toy", "recipe": "ce"}
    return base | {
        "chained": {"after": base["runs"]["fc-ce"] | {"init": "fc-ce"}},
        "multitask": {"both": {"student": "fc", "weights": {"one": 1.0, "two": 1.0}}},
        "tasks": {"one": task, "two": task},
        "students": base["students"] | {"idle": base["students"]["fc"]},
    }


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (["toy"], {"prepare@toy", "verify@toy"}),
        (["tiny"], {"score@tiny"}),
        (
            ["fc-ce", "after"],
            {"evaluate@fc-ce", "export@fc-ce", "evaluate-after@after", "export-after@after"},
        ),
        (["both"], {f"{stage}-tasks@{task}" for stage in ("evaluate", "export") for task in ("one", "two")}),
        (["kd-pool"], {"evaluate@fc-kd-pool", "export@fc-kd-pool"}),
        (["one", "toy"], {"evaluate-tasks@one", "export-tasks@one", "prepare@toy", "verify@toy"}),
    ],
    ids=["dataset and cache", "teacher", "runs", "multitask run", "recipe", "task and others"],
)
def test_a_name_means_all_entries_with_it(tmp_path: Path, names: list[str], stages: set[str]) -> None:
    toy.write_params(tmp_path, several_tasks())
    params = load_params(tmp_path / "params.yaml")
    assert {stage for name in names for stage in run.stages_of(name, params)} == stages


def test_names_that_run_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy.write_params(tmp_path, several_tasks())
    with pytest.raises(
        ConfigError, match=r"no entry of params.yaml is called 'fc-cee'; did you mean 'fc-ce'\?"
    ):
        run.main(["fc-cee"])
    with pytest.raises(ConfigError, match=r"no run of params.yaml uses idle"):
        run.main(["idle"])


def test_run_checks_params_before_dvc_starts_then_runs_what_is_named_and_the_report(project: Project) -> None:
    recipes = toy.params()["recipes"]
    ce = recipes["ce"] | {"epochs": 3}
    project.params(recipes=recipes | {"ce": recipes["ce"] | {"alfa": 1.0}})
    refused = project.run("python", "-m", "stages.main", "run", check=False)
    assert refused.returncode == 1
    assert "recipes.ce.alfa: unknown key; did you mean 'alpha'?" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout
    assert "dvc" not in refused.stdout

    project.params(recipes={"ce": ce, "kd-pool": recipes["kd-pool"] | {"epochs": 3}})
    done = project.run("python", "-m", "stages.main", "run", "fc-ce", PATH=os.environ["PATH"])
    ran = {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}
    assert ran == {"check", "train@fc-ce", "evaluate@fc-ce", "export@fc-ce", "report"}
    (project.root / "models" / "fc-kd-pool" / "training.json").unlink()
    partial = project.run("python", "-m", "stages.main", "run", "tiny")
    assert "report: left as it is, since models/fc-kd-pool/training.json is not here" in partial.stderr
