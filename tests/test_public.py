"""`import stillroom`: lazy, complete, and without torch where none is needed."""

import ast
import subprocess
import sys

import pytest

import stillroom
from tests.imports import ROOT, imported

TORCH_FREE = ("Cache", "StillroomError", "load_params")
SLOW = {"torch", "transformers", "zarr", "fsspec", "pyarrow.compute", "pyarrow.dataset"}


def modules_after(code: str) -> set[str]:
    """The names of all modules that a fresh Python has after this code."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return set(done.stdout.split())


def test_importing_it_imports_nothing_else() -> None:
    new = modules_after("import stillroom") - modules_after("import importlib, typing")
    assert new == {"stillroom"}


def test_opening_a_cache_imports_neither_torch_nor_what_opening_does_not_need() -> None:
    code = "import stillroom; stillroom.Cache.open('tests/golden/cache-v1')"
    assert not modules_after(code) & SLOW


@pytest.mark.parametrize("name", TORCH_FREE)
def test_what_needs_no_torch_never_imports_it(name: str) -> None:
    assert not modules_after(f"import stillroom; stillroom.{name}") & {"torch", "transformers"}


def test_every_public_name_is_there_and_is_listed() -> None:
    for name in stillroom.__all__:
        assert getattr(stillroom, name).__name__ == name
        assert name in dir(stillroom)
    typed = {
        node.name
        for node in ast.walk(ast.parse((ROOT / "stillroom.py").read_text()))
        if isinstance(node, ast.alias)
    }
    assert {*stillroom.__all__} <= typed


def test_another_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Cahce'; it has Cache"):
        _ = stillroom.Cahce


def test_it_imports_no_stage() -> None:
    assert not {name for name in imported(ROOT / "stillroom.py") if name.startswith("stages")}
