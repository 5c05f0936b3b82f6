"""`make compat`: the wheel, installed without torch and used outside the checkout, by each Python found.

For each of python3.11, 3.12 and 3.13: a fresh environment with the base and the `predict` extra at the
versions of constraints.txt; for the first of them also at the lower bounds of pyproject.toml. In each,
tests/installed.py imports stillroom, opens the golden caches, runs the command and answers with an exported
model.

Needs only the standard library. Exits with 1 where an environment fails, or where none of these Pythons is
there.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "stillroom.py", "pipeline", "stages", "storage")
GOLDEN = ("cache-v1", "export", "positions-v3", "rows-v4", "sparse-v2", "states-v4", "table-v5")
GENERATED = shutil.ignore_patterns("__pycache__", "*.pyc")
PROBE = "import ensurepip, sys, venv; print(*sys.version_info[:2], sep='.')"


def candidates(version: str) -> Iterator[Path]:
    """Where a Python of this version may be: on the path, then among those of pyenv."""
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        yield Path(directory) / f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for home in sorted(pyenv.glob(f"versions/{version}*")):
        yield home / "bin" / f"python{version}"


def find_python(version: str) -> Path | None:
    """A Python of this version that can make environments; None where there is none."""
    for path in candidates(version):
        if path.is_file():
            done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:  # not so for a shim of a version that is not chosen
                return path
    return None


def lower_bounds() -> list[str]:
    """The base and the predict extra of pyproject.toml, each at its lower bound: NAME==VERSION."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["predict"]]
    return [re.sub(r"\s*>=\s*([^,\s]+).*", r"==\1", requirement) for requirement in wanted]


def make_environment(python: Path, directory: Path) -> Path:
    """A fresh environment; returns its own Python."""
    subprocess.run([python, "-m", "venv", directory], check=True)
    return directory / "bin" / "python"


def build_wheel(python: Path, place: Path) -> Path:
    """The wheel of this checkout, built from a copy of its sources so that the checkout stays as it is."""
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=GENERATED)
        else:
            shutil.copy(ROOT / name, source / name)
    pip(python, "wheel", "--no-deps", "--wheel-dir", str(place), str(source))
    return next(place.glob("*.whl"))


def pip(python: Path, *arguments: str) -> None:
    """Run pip, and show what it printed where it fails."""
    command = [str(python), "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}")


def use(python: Path, wheel: Path, place: Path, versions: list[str]) -> None:
    """Install the wheel into a fresh environment below `place` and use it there."""
    own = make_environment(python, place / "venv")
    pip(own, "install", "--only-binary=:all:", "--no-compile", *versions, f"{wheel}[predict]")
    for name in GOLDEN:
        shutil.copytree(ROOT / "tests" / "golden" / name, place / "golden" / name)
    for name in ("params.yaml", "tests/installed.py"):
        shutil.copy(ROOT / name, place)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PATH"] = f"{own.parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([own, "installed.py"], cwd=place, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{python}: tests/installed.py failed with these versions: {' '.join(versions)}")


def main() -> None:
    pythons = {version: find_python(version) for version in VERSIONS}
    there = {version: python for version, python in pythons.items() if python}
    for version in VERSIONS:
        if version not in there:
            print(f"python{version}: not on this machine, skipped", flush=True)
    if not there:
        sys.exit(f"no Python of {', '.join(VERSIONS)} is on this machine: nothing was checked")
    pinned = ["--constraint", str(ROOT / "constraints.txt")]
    ways = [(version, "constraints.txt", pinned) for version in there]
    ways.insert(1, (next(iter(there)), "lower bounds", lower_bounds()))
    with tempfile.TemporaryDirectory(prefix="stillroom-compat-") as directory:
        place = Path(directory)
        wheel = build_wheel(make_environment(next(iter(there.values())), place / "build"), place)
        for number, (version, what, versions) in enumerate(ways):
            started = time.perf_counter()
            use(there[version], wheel, place / str(number), versions)
            seconds = time.perf_counter() - started
            print(f"python{version}, {what}: ok, {seconds:.0f} s", flush=True)
    print(f"{wheel.name}: used in {len(ways)} environments without torch")


if __name__ == "__main__":
    main()
