"""Real git and DVC in temporary directories: a finished toy project, made once, copied for each test."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import shared, toy


class Project:
    """A directory with git, DVC and the toy's code, data and params."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def first(self) -> "Repro":
        """What the first `dvc repro` of the finished project did."""
        return Repro(0, (self.root.parent / "output").read_text())

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command here; stdout and stderr come back as text."""
        done = subprocess.run(
            command, cwd=self.root, env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def repro(self, *arguments: str, check: bool = True, **environment: str) -> "Repro":
        """Run `dvc repro`."""
        done = self.run("dvc", "repro", *arguments, check=check, **environment)
        return Repro(done.returncode, done.stdout + done.stderr)

    def stage(self, stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one stage's command as dvc.yaml does."""
        return self.run("python", "-m", f"stages.{stage}", *arguments, check=False)

    def commit(self) -> None:
        """Commit everything that git does not ignore."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", "a step", "--allow-empty")

    def params(self, **changes: Any) -> None:
        """Write params.yaml anew with these shelves replaced."""
        toy.write_params(self.root, toy.params(**changes))

    def files(self, below: str) -> dict[str, bytes]:
        """Every file below a directory with its bytes."""
        root = self.root / below
        return {
            p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
        }

    def shards(self) -> dict[str, int]:
        """The finished shards of the store: path of shard.json to its time of change, in ns."""
        found = (self.root / ".stillroom").glob("[0-9a-f]*/*/shard.json")  # not those in tmp/
        return {str(path): path.stat().st_mtime_ns for path in found}


class Repro:
    """What a `dvc repro` did."""

    def __init__(self, code: int, output: str) -> None:
        self.code, self.output = code, output

    @property
    def stages(self) -> set[str]:
        """The stages whose command ran."""
        return {line.split("'")[1] for line in self.output.splitlines() if line.startswith("Running stage")}


@pytest.fixture(scope="session", autouse=True)
def _quiet_tools(tmp_path_factory: pytest.TempPathFactory, warm_python: dict[str, str]) -> Iterator[None]:
    """Keep DVC, git and datasets away from the user's own settings and caches."""
    home = tmp_path_factory.mktemp("home")
    settings = {
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(home / "dvc"),
        "DVC_SYSTEM_CONFIG_DIR": str(home / "dvc-system"),
        "DVC_SITE_CACHE_DIR": str(home / "dvc-site"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # copies of a project have its bytecode too
        "GIT_CONFIG_GLOBAL": str(home / "gitconfig"),
        **warm_python,
    }
    (home / "gitconfig").write_text(
        "[user]\n name = toy\n email = toy@example.org\n[init]\n defaultBranch = main\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


def start(root: Path, **changes: Any) -> Project:
    """A fresh project with git and DVC, a local remote beside it, nothing run yet."""
    toy.write_project(root, **changes)
    project = Project(root)
    project.run("git", "init", "-q")
    shutil.copytree(
        toy.ROOT / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local")
    )
    project.run("dvc", "remote", "modify", "shelf", "url", str(root.parent / "shelf"))
    (root / ".gitignore").write_text((root / ".gitignore").read_text() + "/model/\n/reviews.csv\n/sources/\n")
    return project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project on which `dvc repro` has run to the end. Tests copy it."""

    def make(root: Path) -> None:
        project = start(root / "project")
        project.commit()
        (root / "output").write_text(project.repro().output)
        project.commit()

    return Project(shared.once(tmp_path_factory, "finished", make) / "project")


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy of the finished project, store and DVC cache included."""
    shutil.copytree(finished.root, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Project]:
    """Makes a project on which nothing has run."""
    return lambda **changes: start(tmp_path / "fresh", **changes)
