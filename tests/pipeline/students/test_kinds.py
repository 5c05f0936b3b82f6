"""Kinds of students: one section with facts and one module each, and no room asks which kind a student is."""

import ast
import inspect

import pytest

from pipeline.config.students import STUDENTS
from pipeline.students.base import StudentModel
from pipeline.students.registry import STUDENT_MODELS
from tests.imports import modules

KNOW_KINDS = {"pipeline.config.students", "pipeline.students.registry"}


def test_every_section_has_a_module_and_every_module_a_section() -> None:
    assert set(STUDENT_MODELS) == set(STUDENTS)


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_facts_of_a_kind_are_what_its_model_does(kind: str) -> None:
    section, model = STUDENTS[kind], STUDENT_MODELS[kind]
    assert issubclass(model, StudentModel)
    forward = list(inspect.signature(model.forward).parameters)[1:]
    assert tuple(forward) == section.reads
    assert (model.features is not StudentModel.features) == section.matchable
    assert (model.initialise is not StudentModel.initialise) == (section.starts_from is not None)
    assert (section.layer_sizes.fget is not STUDENTS["mlp"].layer_sizes.fget) == section.matchable  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith(("pipeline.", "stages."))])
def test_no_room_asks_which_kind_a_student_is(name: str) -> None:
    sections = {section.__name__ for section in STUDENTS.values()}
    tree = ast.parse(modules()[name].read_text())
    if name in KNOW_KINDS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            classes = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            assert not classes & sections, f"{name}:{node.lineno} asks for a fact instead"
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            assert not any(side.endswith("student.kind") for side in sides), f"{name}:{node.lineno}"
