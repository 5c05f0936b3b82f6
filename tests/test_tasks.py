"""What is special about a task is in its two rows: no other code names a task, or tests for one."""

import ast
from collections.abc import Iterator
from typing import get_args

import pytest

from pipeline.config.tasks import DEFAULT_TASK, TASKS, ObjectiveName, inferred_task
from storage.tasks import STORED_TASKS
from tests.imports import modules

ROWS = {"storage.tasks", "pipeline.config.tasks"}
# `task` is the name of a part of a multitask run there.
OF_MULTITASK = {"pipeline.students.registry"}


def code(name: str) -> Iterator[ast.AST]:
    """The nodes of a module, without docstrings of modules, classes, functions and fields."""
    tree = ast.parse(modules()[name].read_text())
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return (node for node in ast.walk(tree) if id(node) not in texts)


def is_task(node: ast.AST) -> bool:
    """Whether an expression is the name of a task: `task`, `x.task` or `x["task"]`."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "task"
    return getattr(node, "id", getattr(node, "attr", None)) == "task"


def names_a_task(text: str, name: str) -> bool:
    objective = name.startswith("pipeline.objectives") and text in get_args(ObjectiveName)
    words = set(text.replace(",", " ").replace(":", " ").replace(".", " ").split())
    return not objective and bool(words & set(STORED_TASKS))


@pytest.mark.parametrize("name", sorted(set(modules()) - ROWS))
def test_no_code_outside_the_two_tables_names_a_task(name: str) -> None:
    texts = [
        node.value for node in code(name) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert not [text for text in texts if names_a_task(text, name)]


@pytest.mark.parametrize("name", sorted(set(modules()) - ROWS - OF_MULTITASK))
def test_no_code_outside_the_two_tables_compares_a_task_or_looks_for_it_in_a_list(name: str) -> None:
    compared = [node for node in code(name) if isinstance(node, ast.Compare)]
    found = [
        ast.unparse(node)
        for node in compared
        if any(map(is_task, (node.left, *node.comparators)))
        and not any(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
    ]
    assert not found


def test_a_task_has_a_row_in_each_table() -> None:
    assert TASKS.keys() == STORED_TASKS.keys()
    assert all(task.stored is STORED_TASKS[name] for name, task in TASKS.items())
    assert DEFAULT_TASK in TASKS


def test_rows_agree_with_what_the_format_knows() -> None:
    for task in TASKS.values():
        assert task.stored.per_position == (task.engine in ("tokens", "language_model"))
        assert (task.engine == "language_model") == task.stored.is_language_model
        assert (task.stored.min_labels == 0) == (task.labels == "none")
        assert (task.inputs == "images") == ("image" in task.stored.parts)


def test_a_summary_that_names_no_task_is_of_one_of_two_told_apart_by_labels() -> None:
    assert inferred_task(has_labels=True) == "sequence-classification"
    assert inferred_task(has_labels=False) == "causal-lm"
