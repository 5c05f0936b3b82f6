"""The layout: imports go one way, rooms keep to their libraries, every file is small and says what it is."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from stages import main
from tests.imports import ROOT, closure, imported, modules

# The packages and, inside pipeline/, the rooms: each imports only those above it in its list.
PACKAGES = ("storage", "pipeline", "stages")
ROOMS = (
    "runtime", "config", "data", "losses", "streaming", "objectives", "codecs", "students", "engines",
    "training", "teachers", "augment", "capture", "evaluation", "export", "report",
)  # fmt: skip
STAGE_HELPERS = {"stages.cli", "stages.paths", "stages.teacher_guard"}
STORAGE_LIBRARIES = {"fsspec", "numpy", "pyarrow", "zarr", "pydantic"}
# Rooms and files of rooms that run without torch: whatever only reads, checks, plans or reports.
TORCH_FREE = (
    "pipeline.config", "pipeline.data", "pipeline.report", "pipeline.export.predictor",
    "pipeline.training.run", "pipeline.training.job", "pipeline.training.processes",
    "pipeline.training.checks",
)  # fmt: skip
MOST_LINES = 400
MOST_FUNCTION_LINES = 50
MOST_PARAMETERS = 6
# Functions past one of these, and why.
LONG_FOR_A_REASON = {
    "pipeline.losses.fused_linear.forward": "an autograd.Function takes its tensors one by one",
    "pipeline.streaming.dataset.__init__": "a public constructor: keywords with defaults, each documented",
    "pipeline.streaming.documents.__init__": "what is read, how, and by whom; all but three have defaults",
    "pipeline.streaming.rows.__init__": "what is read, how, and by whom; all but five have defaults",
}


def room(name: str) -> str:
    """The room of a module of pipeline; empty for others."""
    top, *inside = name.split(".")
    return inside[0] if top == "pipeline" and len(inside) > 1 else ""


def house_imports(name: str) -> set[str]:
    """The modules of this project that a module imports, packages left out."""
    known = modules()
    return {m for m in imported(known[name]) if m in known and known[m].name != "__init__.py"} - {name}


@pytest.mark.parametrize("name", modules())
def test_imports_go_from_stages_to_pipeline_to_storage_and_never_back(name: str) -> None:
    allowed = PACKAGES[: PACKAGES.index(name.split(".")[0]) + 1]
    tops = {other.split(".")[0] for other in imported(modules()[name])} & set(PACKAGES)
    assert tops <= set(allowed), f"{name} may import {allowed} only"


def test_every_room_is_in_the_list_and_every_module_of_pipeline_is_in_a_room() -> None:
    assert {path.name for path in (ROOT / "pipeline").iterdir() if (path / "__init__.py").is_file()} == {
        *ROOMS
    }
    assert all(room(name) for name in modules() if name.startswith("pipeline.") and name.count(".") > 1)
    assert [name for name in modules() if name.startswith("pipeline") and not room(name)] == [
        "pipeline", *(f"pipeline.{name}" for name in sorted(ROOMS))
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in modules() if room(name)])
def test_a_room_imports_only_rooms_above_it(name: str) -> None:
    below = set(ROOMS[ROOMS.index(room(name)) + 1 :])
    assert not {m for m in house_imports(name) if room(m) in below}


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = {name: house_imports(name) for name in modules()}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_students_are_trained_without_the_teacher() -> None:
    for name in modules():
        if room(name) in {"training", "streaming", "students"}:
            assert not {m for m in house_imports(name) if room(m) in {"engines", "teachers"}}, name


def test_the_report_imports_no_other_room() -> None:
    for name in modules():
        if room(name) == "report":
            assert {room(m) for m in house_imports(name)} <= {"report", ""}, name


@pytest.mark.parametrize("package", TORCH_FREE)
def test_what_reads_and_checks_never_imports_torch(package: str) -> None:
    own = [n for n in modules() if n == package or n.startswith(f"{package}.")]
    code = f"import sys, {', '.join(own)}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_stage_imports_another_or_torch() -> None:
    for name in modules():
        if name.startswith("stages."):
            sideways = {m for m in house_imports(name) if m.startswith("stages.")} - STAGE_HELPERS
            assert not sideways, f"{name} imports {sideways}"
            libraries = {other.split(".")[0] for other in imported(modules()[name])}
            assert not libraries & {"torch", "transformers"}, name


def test_storage_needs_five_libraries_and_one_file_knows_dask() -> None:
    for name, path in modules().items():
        libraries = {other.split(".")[0] for other in imported(path)} - set(sys.stdlib_module_names)
        if name.split(".")[0] == "storage":
            assert libraries <= STORAGE_LIBRARIES | {"storage"}, name
        assert not libraries & {"dask", "distributed"} or name == "pipeline.capture.dask_cluster", name
        assert "fsspec" not in libraries or name == "storage.remote", name


def test_dask_is_imported_where_a_capture_is_not_inline_and_nowhere_else() -> None:
    importers = {
        name for name, path in modules().items() if "pipeline.capture.dask_cluster" in imported(path)
    }
    assert importers == {"pipeline.capture.answer"}
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
    modules_run = ("stages.main", *(f"stages.commands.{name}" for name in main.BY_HAND))
    files = {file for module in modules_run for file in closure(module)}
    libraries = {name.split(".")[0] for file in files for name in imported(ROOT / file)}
    assert libraries - set(sys.stdlib_module_names) - set(PACKAGES) == {
        re.split(r"[.>]", requirement)[0] for requirement in installed
    }


def test_every_file_says_what_it_is_and_is_one_idea_long() -> None:
    for path in [*modules().values(), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        source = path.read_text()
        assert ast.get_docstring(ast.parse(source)), f"{path} has no docstring"
        assert source.count("\n") <= MOST_LINES, f"{path} is past {MOST_LINES} lines: split it"


def test_functions_are_short_and_take_few_parameters_or_have_a_reason() -> None:
    long = set()
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                parameters = [argument for argument in arguments if argument.arg not in ("self", "cls")]
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_FUNCTION_LINES or len(parameters) > MOST_PARAMETERS:
                    long.add(f"{name}.{node.name}")
    assert long == set(LONG_FOR_A_REASON)
