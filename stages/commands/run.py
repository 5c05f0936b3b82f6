"""`stillroom run [NAMES]`: check params.yaml, then `dvc repro` of these entries and of the report."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.base import did_you_mean
from pipeline.config.load import load_params
from pipeline.config.params import PARAMS, Params, TaskRun
from pipeline.runtime.progress import log
from stages import cli, paths
from storage.errors import ConfigError

# The last stages of an entry, by its section: DVC runs what they depend on.
LAST_STAGES = {
    "assets": ("fetch",),
    "datasets": ("prepare",),
    "augmented": ("augment",),
    "teachers": ("score",),
    "caches": ("verify",),
    "mixtures": ("mix",),
    "received": ("receive",),
    "runs": ("evaluate", "export"),
    "chained": ("evaluate-after", "export-after"),
    "tasks": ("evaluate-tasks", "export-tasks"),
}
USED_BY = ("students", "recipes", "multitask")  # an entry of these means all runs, or tasks, that name it


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Entries of params.yaml; a student or recipe means its runs. None: everything."),
    ] = None,
) -> None:
    """Check params.yaml, then run what these entries need and the report, by `dvc repro`.

    A name that is in several sections means all of its entries: `reviews` is a dataset and a cache.
    """
    params = load_params()
    targets = list(dict.fromkeys(target for name in names or () for target in stages_of(name, params)))
    if names and not targets:
        raise ConfigError(f"no run of {PARAMS} uses {' or '.join(names)}: there is nothing to run.")
    if find_spec("dvc") is None:
        raise ModuleNotFoundError(name="dvc")
    _dvc_repro(*targets)
    if targets and _can_report(params):
        _dvc_repro("--single-item", "report")


def stages_of(name: str, params: Params) -> Iterator[str]:
    """The last stages of all entries called `name`. Raises ConfigError, with the nearest name, for none."""
    sections = [section for section in (*LAST_STAGES, *USED_BY) if name in getattr(params, section)]
    if not sections:
        known = {entry for section in (*LAST_STAGES, *USED_BY) for entry in getattr(params, section)}
        raise ConfigError(f"no entry of {PARAMS} is called {name!r}{did_you_mean(name, sorted(known))}")
    for section in sections:
        entries = {section: [name]} if section in LAST_STAGES else _users(name, params)
        for users, found in entries.items():
            yield from (f"{stage}@{entry}" for entry in found for stage in LAST_STAGES[users])


def _users(name: str, params: Params) -> dict[str, list[str]]:
    """The runs, chained runs and tasks that name a student, a recipe or a multitask run, by section."""
    return {
        section: [
            entry
            for entry in getattr(params, section)
            for run in (params.everything_trained[entry],)
            if name in (run.student, run.recipe, run.run if isinstance(run, TaskRun) else None)
        ]
        for section in ("runs", "chained", "tasks")
    }


def _can_report(params: Params) -> bool:
    """True if there are results, and each run that has some has its record: not after `--pull` of a few."""
    trained = params.everything_trained
    results = [path.stem for path in paths.EVAL.glob("*.json")]
    records = [paths.of_run(name, trained[name]).out / "training.json" for name in results if name in trained]
    missing = [str(path) for path in records if not path.is_file()]
    if missing:
        log(f"report: left as it is, since {missing[0]} is not here")
    return bool(results) and not missing


def _dvc_repro(*arguments: str) -> None:
    """Run `dvc repro` in this Python's environment; exit with its code where it fails."""
    here, search = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if here not in search.split(os.pathsep):
        search = f"{here}{os.pathsep}{search}"
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    code = subprocess.run(command, env=os.environ | {"PATH": search}, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    cli.run(main)
