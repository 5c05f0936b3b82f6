"""Checks across entries of params.yaml: names, chains, mixtures, multitask runs, teachers and caches."""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.config.params import Params
from pipeline.config.students import STUDENTS, LlamaStudent, MLPStudent, Student, TransformersStudent
from pipeline.config.tasks import TASKS, tasks_with


def teacher_inconsistencies(params: "Params") -> Iterator[str]:
    """What caches ask for that their teachers' tasks do not have, field by field. Names are known to fit."""
    for name, entry in params.caches.items():
        task = params.datasets[params.teachers[entry.teacher].dataset].task
        row, dense = TASKS[task], not entry.targets.sparse
        if dense and row.stored.codecs == "sparse":
            yield f"caches.{name}.targets: dense is for few classes, not {task}; write targets: threshold"
        if not dense and row.stored.codecs == "dense":
            yield f"caches.{name}.targets: {task} keeps all its numbers; write targets: dense"
        if params.teachers[entry.teacher].embedding is not None and not row.makes_vectors:
            yield f"teachers.{entry.teacher}.embedding: {task} makes no vectors; remove it"
        if entry.hidden is not None and row.inputs == "images":
            yield f"caches.{name}.hidden: no states of {task} are kept; remove it"
        if entry.mask is not None and not row.masked:
            masked = tasks_with(masked=True)
            yield f"caches.{name}.mask: only {masked} reads masks, its teacher's task is {task}; remove it"


# One optimiser and one schedule: recipes of one run say the same of these.
SHARED = ("epochs", "warmup", "weight_decay", "evaluations_per_epoch", "patience")


def multitask_inconsistencies(params: "Params") -> Iterator[str]:
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


def _misfits_of_student(where: str, student: Student) -> Iterator[str]:
    if isinstance(student, LlamaStudent | MLPStudent):
        kinds = ", ".join(kind for kind, section in STUDENTS.items() if section.inputs == "text")
        yield f"{where}: found kind {student.kind}, expected one of rows of text: {kinds}"
    elif not isinstance(student, TransformersStudent) and student.init and student.init.from_teacher:
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


class _Reference(NamedTuple):
    field: str
    name: str
    shelf: str  # or two, parted by " or "


def known_names(params: Params, reference: _Reference) -> list[str]:
    """The names that a reference may take."""
    return [name for shelf in reference.shelf.split(" or ") for name in getattr(params, shelf)]


def _either(params: Params, shelf: str, *others: str) -> str:
    """The shelf, and those of the others that have entries."""
    return " or ".join([shelf, *(other for other in others if getattr(params, other))])


def references(params: Params) -> Iterator[_Reference]:
    """Every name that an entry gives of another entry."""
    prepared = _either(params, "datasets", "augmented")
    caches = _either(params, "caches", "mixtures")
    readable = _either(params, "caches", "mixtures", "received")
    for name, augmented in params.augmented.items():
        yield _Reference(f"augmented.{name}.dataset", augmented.dataset, "datasets")
    for name, teacher in params.teachers.items():
        yield _Reference(f"teachers.{name}.dataset", teacher.dataset, "datasets")
    for name, cache in params.caches.items():
        yield _Reference(f"caches.{name}.dataset", cache.dataset, prepared)
        yield _Reference(f"caches.{name}.teacher", cache.teacher, "teachers")
    for name, mixture in params.mixtures.items():
        for cache_name in mixture.caches:
            yield _Reference(f"mixtures.{name}.caches", cache_name, caches)
    for shelf in ("runs", "chained"):
        for name, run in getattr(params, shelf).items():
            yield _Reference(f"{shelf}.{name}.dataset", run.dataset, prepared)
            yield _Reference(f"{shelf}.{name}.cache", run.cache, readable)
            yield _Reference(f"{shelf}.{name}.student", run.student, "students")
            yield _Reference(f"{shelf}.{name}.recipe", run.recipe, "recipes")
    for name, chained in params.chained.items():
        yield _Reference(f"chained.{name}.init", chained.init, "runs or chained")
    for name, several in params.multitask.items():
        yield _Reference(f"multitask.{name}.student", several.student, "students")
        for task_name in several.weights:
            yield _Reference(f"multitask.{name}.weights", task_name, "tasks")
    for name, task in params.tasks.items():
        yield _Reference(f"tasks.{name}.run", task.run, "multitask")
        yield _Reference(f"tasks.{name}.dataset", task.dataset, prepared)
        yield _Reference(f"tasks.{name}.cache", task.cache, caches)
        yield _Reference(f"tasks.{name}.recipe", task.recipe, "recipes")


def broken_chains(params: Params) -> Iterator[str]:
    """Chained runs that cannot start from what they name. Names are known to be there."""
    for name, run in params.chained.items():
        if name in params.runs:
            yield f"chained.{name}: runs has this name too; give it another"
        before = params.every_run[run.init]
        if before.student != run.student:
            yield f"chained.{name}.student: found {run.student!r}, but {run.init} trains {before.student!r}"
        if len(before.seeds) > 1 and (lacking := set(run.seeds) - set(before.seeds)):
            yield f"chained.{name}.seeds: {run.init} has {list(before.seeds)}, not {sorted(lacking)}"
        seen = [name]
        while (link := params.chained.get(seen[-1])) and link.init not in seen:
            seen.append(link.init)
        if link:
            yield f"chained.{name}.init: comes back to {link.init!r}, {' <- '.join(seen)}"


def circular_mixtures(params: Params) -> Iterator[str]:
    """Mixtures that have a cache's name, or that hold themselves. Names are known to be there."""
    for name in params.mixtures:
        if name in params.caches:
            yield f"mixtures.{name}: caches has this name too; give it another"
        waiting, seen = [name], set[str]()
        while waiting:
            entry = params.mixtures.get(waiting.pop())
            inside = set(entry.caches) - seen if entry else set()
            waiting += inside
            seen |= inside
        if name in seen:
            yield f"mixtures.{name}.caches: it holds itself, by way of {', '.join(sorted(seen))}"
