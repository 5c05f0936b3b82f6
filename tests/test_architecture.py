"""The house: imports go one way, rooms keep to their libraries, every file is small and says what it is."""

import ast
import sys
import tomllib

import pytest

from tests.imports import ROOT, closure, imported, modules

MAY_IMPORT = {
    "stages": {"stages", "pipeline", "storage"},
    "pipeline": {"pipeline", "storage"},
    "storage": {"storage"},
}
STAGE_HELPERS = {"stages", "stages.cli", "stages.paths", "stages.elsewhere"}
STORAGE_LIBRARIES = {"fsspec", "numpy", "pyarrow", "zarr", "pydantic"}
MOST_LINES = 400


@pytest.mark.parametrize("name", modules())
def test_imports_go_from_stages_to_pipeline_to_storage_and_never_back(name: str) -> None:
    room = name.split(".")[0]
    rooms = {other.split(".")[0] for other in imported(modules()[name])} & set(MAY_IMPORT)
    assert rooms <= MAY_IMPORT[room], f"{name} may import {MAY_IMPORT[room]} only"


def test_no_stage_imports_another_or_torch() -> None:
    for name, path in modules().items():
        if name.startswith("stages."):
            found = imported(path)
            sideways = {other for other in found if other.startswith("stages")} - STAGE_HELPERS
            assert not {s for s in sideways if ".".join(s.split(".")[:2]) not in STAGE_HELPERS}, name
            assert not {other for other in found if other.split(".")[0] in {"torch", "transformers"}}, name


def test_storage_needs_five_libraries_and_pipeline_holds_no_dask() -> None:
    for name, path in modules().items():
        libraries = {other.split(".")[0] for other in imported(path)} - set(sys.stdlib_module_names)
        if name.split(".")[0] == "storage":
            assert libraries <= STORAGE_LIBRARIES | {"storage"}, name
        assert not libraries & {"dask", "distributed"}, name
        assert "fsspec" not in libraries or name == "storage.remote", name


def test_an_install_for_predict_alone_has_what_predict_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {*project["dependencies"], *project["optional-dependencies"]["predict"]}
    libraries = {name.split(".")[0] for file in closure("stages.predict") for name in imported(ROOT / file)}
    assert libraries - set(sys.stdlib_module_names) - set(MAY_IMPORT) == {n.split(".")[0] for n in installed}


def test_every_file_says_what_it_is_and_is_one_idea_long() -> None:
    for path in [*modules().values(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        source = path.read_text()
        assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
        assert source.count("\n") <= MOST_LINES, f"{path} is past {MOST_LINES} lines: split it"
