"""Entries of params.yaml: `multitask` and `tasks`, one student that learns several tasks, a cache each.

Tasks lie on a shelf of their own and name their run, and not the other way round: for DVC every entry of a
shelf has the same kinds of dependencies, so an entry can depend on one cache and not on any number of them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from pipeline import kinds
from pipeline.section import Name, Section, distinct

if TYPE_CHECKING:
    from pipeline.config import Params

# One optimiser and one schedule: recipes of one run say the same of these.
SHARED = ("epochs", "warmup", "weight_decay", "evaluations_per_epoch", "patience")


class TaskEntry(Section):
    """One of the tasks of a run: what it learns from, and how."""

    run: Name
    """Of multitask."""
    dataset: Name
    cache: Name
    """Of caches, or of mixtures."""
    recipe: Name
    """Its losses and batch_rows are this task's own; how long to train, all recipes of a run agree on."""


class Multitask(Section):
    """One student with an output layer for each of several tasks (Caruana 1997; Liu et al. 2019)."""

    student: Name
    weights: Annotated[dict[Name, Annotated[float, Field(gt=0)]], Field(min_length=2)]
    """How much the loss of each task counts: all tasks that name this run. Only the ratios matter."""
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False), AfterValidator(distinct)
    ] = (0,)


def misfits(params: "Params") -> Iterator[str]:
    """What cannot be in runs of several tasks, field by field. Names are known to be on their shelves."""
    shelves = {shelf: getattr(params, shelf) for shelf in ("runs", "chained", "multitask", "tasks")}
    for shelf in ("multitask", "tasks"):
        for name in shelves[shelf]:
            others = [other for other in shelves if other != shelf and name in shelves[other]]
            if others and (shelf, others) != ("tasks", ["multitask"]):  # said once
                yield f"{shelf}.{name}: {others[0]} has this name too; give it another"
    for name, entry in params.multitask.items():
        own = [task for task, known in params.tasks.items() if known.run == name]
        if set(own) != set(entry.weights):
            yield (
                f"multitask.{name}.weights: found {sorted(entry.weights)}, but the tasks that name this run "
                f"are {sorted(own)}; weigh each of them, and no other"
            )
        yield from _misfits_of_student(f"multitask.{name}.student", params.students[entry.student])
        yield from _misfits_of_recipes(params, own)


def _misfits_of_student(where: str, student: kinds.Student) -> Iterator[str]:
    if isinstance(student, kinds.Llama | kinds.MLP):
        yield f"{where}: found kind {student.kind}, expected one of rows of text: fc, bilstm, tinybert"
    elif not isinstance(student, kinds.Transformers) and student.init and student.init.from_teacher:
        yield f"{where}: its init takes weights of one teacher, and here are several; remove it"


def _misfits_of_recipes(params: "Params", own: list[str]) -> Iterator[str]:
    first = own[0] if own else ""
    for name in own:
        recipe, where = params.recipes[params.tasks[name].recipe], f"tasks.{name}.recipe"
        if recipe.match:
            yield f"{where}: match is for runs of one task; remove it"
        if recipe.grid:
            yield f"{where}: leaves a choice ({', '.join(recipe.grid[0])}); choose in a run of one task"
        for field in SHARED:
            found, wanted = (
                getattr(params.recipes[params.tasks[task].recipe], field) for task in (name, first)
            )
            if found != wanted:
                yield f"{where}: {field} is {found}, but {wanted} in {first}; tasks of one run train together"
