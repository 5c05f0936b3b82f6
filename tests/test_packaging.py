"""The wheel: every module and data file is in it, and its ranges of versions contain the pinned ones.

`make compat` installs the wheel and uses it; here is what can be seen without installing anything.
"""

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import stillroom
from pipeline.export.predictor import Predictor
from tests import compat
from tests.golden import make_export
from tests.imports import ROOT, modules

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra),
]
PINNED = dict(
    line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
)


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_every_requirement_is_a_range_with_a_lower_bound_that_holds_the_pinned_version(
    requirement: str,
) -> None:
    found = re.fullmatch(r"([A-Za-z0-9._-]+)(\[\w+\])?>=([\d.]+)", requirement)
    assert found, f"{requirement}: expected NAME>=VERSION"
    name, _, bound = found.groups()
    pinned = PINNED.get(name.lower()) or PINNED[name.lower().replace("-", "_")]
    assert numbers(pinned) >= numbers(bound)


def test_one_package_has_one_lower_bound() -> None:
    assert len({requirement.split(">=")[0] for requirement in REQUIREMENTS}) == len(set(REQUIREMENTS))


def test_any_python_from_3_11_on_may_install_it() -> None:
    assert PROJECT["requires-python"] == ">=3.11"


def test_every_module_of_the_three_packages_and_the_public_face_are_in_the_wheel() -> None:
    included = SETUPTOOLS["packages"]["find"]["include"]
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    for name in modules():
        package = name if name in packages else name.rpartition(".")[0]
        assert package in packages, f"{name}: its directory has no __init__.py, so the wheel would lack it"
        assert any(fnmatch(package, pattern) for pattern in included), name
    assert SETUPTOOLS["py-modules"] == ["stillroom"]


def test_every_file_of_the_packages_that_is_not_python_is_in_the_wheel() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "pipeline", "stages", "storage"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    files = [Path(line) for line in listed.stdout.splitlines() if not line.endswith(".py")]
    assert files
    for path in files:
        package, *rest = path.parts
        patterns = SETUPTOOLS["package-data"].get(package, [])
        assert any(fnmatch("/".join(rest), pattern) for pattern in patterns), path


def test_the_version_has_one_home() -> None:
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "stillroom.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", stillroom.__version__)


def test_a_python_is_found_where_it_runs_and_not_where_it_only_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    shim = tmp_path / "shims" / f"python{version}"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    there = tmp_path / "pyenv" / "versions" / f"{version}.9" / "bin" / f"python{version}"
    there.parent.mkdir(parents=True)
    there.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert compat.find_python(version) == there
    assert compat.find_python("3.99") is None


def test_lower_bounds_are_read_from_pyproject() -> None:
    bounds = compat.lower_bounds()
    assert "numpy==2.0" in bounds
    assert {bound.split("==")[0] for bound in bounds} >= {"zarr", "pyarrow", "onnxruntime"}


def test_the_golden_export_answers() -> None:
    for form in ("float32", "int8"):
        model = Predictor(make_export.GOLDEN, form)
        assert [model.predict(text).label for text in ("good film", "bad dull film")] == [
            "positive",
            "negative",
        ]


def test_todays_exporter_makes_an_export_that_answers_as_the_golden_one(tmp_path: Path) -> None:
    make_export.write(tmp_path / "export")
    golden, made = (Predictor(path, "float32") for path in (make_export.GOLDEN, tmp_path / "export"))
    for text in ("good film", "bad dull bright film", "nothing known"):
        expected = golden.predict(text).probabilities
        assert made.predict(text).probabilities == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "export" / "export.json").read_text() == (
        make_export.GOLDEN / "export.json"
    ).read_text()
