"""The house: imports go one way, rooms keep to their libraries, every file is small and says what it is."""

import ast
import re
import subprocess
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
COMMANDS = {"stages.gc", "stages.merge", "stages.predict", "stages.publish"}  # what stages.command gathers
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
            sideways -= {f"{c}.main" for c in COMMANDS} | COMMANDS if name == "stages.command" else set()
            assert not {s for s in sideways if ".".join(s.split(".")[:2]) not in STAGE_HELPERS}, name
            assert not {other for other in found if other.split(".")[0] in {"torch", "transformers"}}, name


def test_storage_needs_five_libraries_and_one_file_knows_dask() -> None:
    for name, path in modules().items():
        libraries = {other.split(".")[0] for other in imported(path)} - set(sys.stdlib_module_names)
        if name.split(".")[0] == "storage":
            assert libraries <= STORAGE_LIBRARIES | {"storage"}, name
        assert not libraries & {"dask", "distributed"} or name == "pipeline.cluster", name
        assert "fsspec" not in libraries or name == "storage.remote", name


def test_dask_is_imported_where_a_capture_is_not_inline_and_nowhere_else() -> None:
    importers = {name for name, path in modules().items() if "pipeline.cluster" in imported(path)}
    assert importers == {"pipeline.capture"}
    code = "import sys, stages.cache; sys.exit(bool({'dask', 'distributed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# What runs, or lets a file run, code that is not the house's own.
RUNS_CODE = re.compile(
    r"(?<![\w.])(eval|exec|compile|__import__)\(|\b(pickle|cPickle|dill|cloudpickle|joblib|marshal|shelve)\b"
    r"|torch\.load\(|allow_pickle=True|trust_remote_code.{0,3}True|yaml\.(unsafe_|full_)?load\(|weights_only=False"
)


@pytest.mark.parametrize("name", modules())
def test_nothing_is_unpickled_and_no_code_of_strangers_is_run(name: str) -> None:
    tree = ast.parse(modules()[name].read_text())
    for node in ast.walk(tree):  # words in docstrings run nothing
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    assert not (found := RUNS_CODE.search(ast.unparse(tree))), found


def test_every_model_that_transformers_loads_is_told_to_run_no_code() -> None:
    calls = [
        (name, node)
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) >= 6
    for name, call in calls:
        said = ast.unparse(call)
        of_its_own_class = ast.unparse(call.func) == "LlamaConfig.from_pretrained"
        assert of_its_own_class or "trust_remote_code=False" in said or "**" in said, f"{name}: {said}"


def test_an_install_for_the_command_alone_has_what_it_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {*project["dependencies"], *project["optional-dependencies"]["predict"]}
    libraries = {name.split(".")[0] for file in closure("stages.command") for name in imported(ROOT / file)}
    assert libraries - set(sys.stdlib_module_names) - set(MAY_IMPORT) == {n.split(".")[0] for n in installed}


def test_every_file_says_what_it_is_and_is_one_idea_long() -> None:
    for path in [*modules().values(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        source = path.read_text()
        assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
        assert source.count("\n") <= MOST_LINES, f"{path} is past {MOST_LINES} lines: split it"
