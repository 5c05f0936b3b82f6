"""Commands that code, messages and docs name can be run: their modules exist."""

import re
from pathlib import Path

import pytest

from tests.imports import ROOT, modules

FILES = [
    *modules().values(), *ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "Makefile", ROOT / "dvc.yaml",
    *ROOT.glob("examples/**/*.md"), *ROOT.glob("examples/**/dvc.yaml"),
]  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_that_is_run_as_a_command_exists(path: Path) -> None:
    named = re.findall(r"-m (stages[\w.]*\w)", path.read_text())
    assert set(named) <= set(modules())
