"""Seconds of `dvc repro`, `dvc status` and `stillroom run` with nothing to do, and of the start of stages.

The project is a toy with six runs, which is made first, or a finished one: `--project DIRECTORY`.
Start-up is `python -c "import stages.NAME"` for stages without torch, and `stillroom --help`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common

from tests import toy

WITHOUT_TORCH = ("check", "fetch", "prepare", "report", "train")
ROUNDS = 3
PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(root: Path, *command: str) -> None:
    """Run a command of this environment in a directory, without its output."""
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL, env=os.environ | PATH)


def make_project(root: Path) -> Path:
    """A toy project with six runs, finished."""
    base = toy.params()
    students = {"fc": base["students"]["fc"], "wide": base["students"]["fc"] | {"hidden": 16}}
    recipes = base["recipes"] | {"kd": base["recipes"]["ce"] | {"alpha": 0.5}}
    shared = base["runs"]["fc-ce"] | {"seeds": [0]}
    runs = {
        f"{student}-{recipe}": shared | {"student": student, "recipe": recipe}
        for student in students
        for recipe in recipes
    }
    toy.write_project(root, students=students, recipes=recipes, runs=runs)
    for command in (("git", "init", "-q"), ("dvc", "init", "-q"), ("dvc", "repro", "-q")):
        run(root, *command)
    return root


def main() -> None:
    """Measure, and print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path)
    finished = parser.parse_args().project
    with tempfile.TemporaryDirectory() as temporary:
        root = finished or make_project(Path(temporary) / "project")
        python = (sys.executable, "-c")
        ways = {
            "dvc status": ("dvc", "status"),
            "dvc repro": ("dvc", "repro"),
            "stillroom run": ("stillroom", "run"),
            "stillroom --help": ("stillroom", "--help"),
            **{f"import stages.{name}": (*python, f"import stages.{name}") for name in WITHOUT_TORCH},
        }
        found = common.medians({name: lambda way=way: run(root, *way) for name, way in ways.items()}, ROUNDS)
    for name, seconds in found.items():
        print(f"{name:22} {seconds:6.2f} s")
    common.print_result({name: round(seconds, 2) for name, seconds in found.items()})


if __name__ == "__main__":
    main()
