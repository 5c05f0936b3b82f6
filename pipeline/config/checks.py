"""Checks across entries of params.yaml: names, chains, mixtures, multitask runs, teachers and caches."""

from collections.abc import Iterator
from typing import NamedTuple

from pipeline.config.params import Params
from pipeline.config.students import STUDENTS, Student
from pipeline.config.tasks import TASKS, tasks_with


def teacher_inconsistencies(params: Params) -> Iterator[str]:
    """Fields of caches and teachers that do not fit the teacher's task. All names were found before."""
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


# One optimiser and one schedule: the recipes of one run agree on these fields.
SHARED = ("epochs", "warmup", "weight_decay", "evaluations_per_epoch", "patience")


def multitask_inconsistencies(params: Params) -> Iterator[str]:
    """Fields of multitask runs and their parts that do not fit each other. All names were found before."""
    sections = {section: getattr(params, section) for section in ("runs", "chained", "multitask", "tasks")}
    for section in ("multitask", "tasks"):
        for name in sections[section]:
            others = [other for other in sections if other != section and name in sections[other]]
            if others and (section, others) != ("tasks", ["multitask"]):  # reported once, for multitask
                yield f"{section}.{name}: {others[0]} has this name too; give it another"
    for name, entry in params.multitask.items():
        parts = [part for part, known in params.tasks.items() if known.run == name]
        if set(parts) != set(entry.weights):
            yield (
                f"multitask.{name}.weights: found {sorted(entry.weights)}, expected a weight for each of the "
                f"tasks that name this run: {sorted(parts)}"
            )
        yield from _student_inconsistencies(f"multitask.{name}.student", params.students[entry.student])
        yield from _recipe_inconsistencies(params, parts)


def _student_inconsistencies(where: str, student: Student) -> Iterator[str]:
    if student.inputs != "text":
        kinds = ", ".join(kind for kind, section in STUDENTS.items() if section.inputs == "text")
        yield f"{where}: found kind {student.kind}, expected one that reads rows of text: {kinds}"
    elif student.starts_from_teacher:
        yield f"{where}: its init copies weights of one teacher, and this run has several; remove it"


def _recipe_inconsistencies(params: Params, parts: list[str]) -> Iterator[str]:
    first = parts[0] if parts else ""
    for name in parts:
        recipe, where = params.recipes[params.tasks[name].recipe], f"tasks.{name}.recipe"
        if recipe.match:
            yield f"{where}: match is for runs of one task; remove it"
        if recipe.grid:
            yield f"{where}: has candidates ({', '.join(recipe.grid[0])}); choose one in a run of one task"
        for field in SHARED:
            found, expected = (
                getattr(params.recipes[params.tasks[part].recipe], field) for part in (name, first)
            )
            if found != expected:
                yield f"{where}: {field} is {found}, but {expected} in {first}; one run has one schedule"


class _Reference(NamedTuple):
    """A name of another entry, and the sections that may have it."""

    field: str
    name: str
    sections: str  # one, or several joined by " or "


def known_names(params: Params, reference: _Reference) -> list[str]:
    """The names that a reference may have."""
    return [name for section in reference.sections.split(" or ") for name in getattr(params, section)]


def _any_of(params: Params, section: str, *others: str) -> str:
    """The section, and those of the others that have entries."""
    return " or ".join([section, *(other for other in others if getattr(params, other))])


def references(params: Params) -> Iterator[_Reference]:
    """Every name of another entry in params.yaml."""
    prepared = _any_of(params, "datasets", "augmented")
    caches = _any_of(params, "caches", "mixtures")
    readable = _any_of(params, "caches", "mixtures", "received")
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
    for section in ("runs", "chained"):
        for name, run in getattr(params, section).items():
            yield _Reference(f"{section}.{name}.dataset", run.dataset, prepared)
            yield _Reference(f"{section}.{name}.cache", run.cache, readable)
            yield _Reference(f"{section}.{name}.student", run.student, "students")
            yield _Reference(f"{section}.{name}.recipe", run.recipe, "recipes")
    for name, chained in params.chained.items():
        yield _Reference(f"chained.{name}.init", chained.init, "runs or chained")
    for name, multitask in params.multitask.items():
        yield _Reference(f"multitask.{name}.student", multitask.student, "students")
        for part_name in multitask.weights:
            yield _Reference(f"multitask.{name}.weights", part_name, "tasks")
    for name, part in params.tasks.items():
        yield _Reference(f"tasks.{name}.run", part.run, "multitask")
        yield _Reference(f"tasks.{name}.dataset", part.dataset, prepared)
        yield _Reference(f"tasks.{name}.cache", part.cache, caches)
        yield _Reference(f"tasks.{name}.recipe", part.recipe, "recipes")


def shared_names(params: Params) -> Iterator[str]:
    """Names of two entries that would be written to one place."""
    for first, other, directory in (
        ("datasets", "augmented", "data"),
        ("received", "caches", "caches"),
        ("received", "mixtures", "caches"),
    ):
        for name in sorted({*getattr(params, first)} & {*getattr(params, other)}):
            yield f"{name!r} is in {first} and in {other}: both would be {directory}/{name}; rename one"
    for name in params.teachers:
        if f"teacher-{name}" in params.everything_trained:
            yield f"'teacher-{name}' is a run, and the results of teachers.{name} have this name; rename one"


def broken_chains(params: Params) -> Iterator[str]:
    """Chained runs that do not fit the run that they start from. All names were found before."""
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
            yield f"chained.{name}.init: circular, {' <- '.join([*seen, link.init])}"


def circular_mixtures(params: Params) -> Iterator[str]:
    """Mixtures that have the name of a cache, or contain themselves. All names were found before."""
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
            yield f"mixtures.{name}.caches: the mixture contains itself, through {', '.join(sorted(seen))}"


# Checks of entries against each other, once every name is known.
CHECKS = (
    shared_names,
    broken_chains,
    circular_mixtures,
    multitask_inconsistencies,
    teacher_inconsistencies,
)
