"""The schema of params.yaml: frozen, strict, and the only place that says what a field means.

Entries of the shelves are described in config_data.py (assets, datasets), config_augmented.py,
config_teachers.py (teachers, caches), kinds.py (students), config_recipes.py and config_match.py (recipes),
config_tasks.py (several tasks); runs, and how a file is read
and checked, are here.
An unknown key is an error that names the nearest known one; so is a name that no shelf holds. Numbers carry
their unit in the docstring below the field. Defaults are the values that a newcomer should start from.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import config_tasks
from pipeline.config_augmented import Augmented
from pipeline.config_data import Asset, Dataset
from pipeline.config_recipes import Recipe
from pipeline.config_teachers import CacheEntry, MixtureEntry, Received, Teacher
from pipeline.faults import faults, nearest
from pipeline.kinds import Student
from pipeline.section import Name, Positive, Section, distinct
from pipeline.targets import misfits
from storage.errors import ConfigError

PARAMS = Path("params.yaml")
Entry = TypeVar("Entry")


class Run(Section):
    """cache x student x recipe x seeds, over the labels and splits of a dataset."""

    dataset: Name
    """Labels and splits; usually the one that the cache was made from."""
    cache: Name
    """Of caches, or of mixtures."""
    student: Name
    recipe: Name
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False), AfterValidator(distinct)
    ] = (0,)


class ChainedRun(Run):
    """A run whose students start from those of another one, with the same student and tokenizer.

    A shelf of its own: for DVC every entry of a shelf depends on the same kinds of things.
    """

    init: Name
    """The run, chained or not, that must be trained before. Seed s starts from its seed s, or from its only
    one."""


class TaskRun(Run):
    """One of the tasks of a run that learns several, as what is asked of it later sees it: a run."""

    run: Name
    """The student that answers: of multitask."""


class Export(Section):
    """What an exported model may lose."""

    int8_max_loss: Annotated[float, Field(ge=0)] = 1.0
    """Points of accuracy on the test split that int8 may lose; an export that loses more is refused."""


class Workers(Section):
    """How work is spread, over this machine or several. Never changes a result. docs/workers.md says more."""

    capture: Annotated[str, Field(pattern=r"^(inline|local|(tcp|tls|ws|wss)://\S+)$")] = "inline"
    """Where teachers are asked: `inline`, in the process of the stage; `local`, in processes of this machine;
    or the address of a Dask scheduler, like tcp://10.0.0.1:8786, whose workers see the same directories."""
    threads: Positive | None = None
    """Threads of arithmetic of each teacher, inline too; null: all cores of this machine. It is never derived
    from the number of processes: threads may round differently, and processes must not."""
    processes: Positive | None = None
    """`local`: processes, each with a teacher of its own; null: one a GPU or, without, cores / threads."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """`local`: GPUs to use, the first ones that are visible, a process each; null: all."""
    shard_timeout: Positive = 3600
    """Seconds from handing a shard out to having it. One that takes longer is taken from its worker, which is
    restarted, and goes to another one. Two are handed out to each worker, so one may take half of this."""
    seeds_at_once: Positive | None = None
    """Seeds of a run trained side by side, each on one thread; null: two a core."""
    readers: Annotated[int, Field(ge=0)] = 1
    """Threads of a training beside its own that read the cache: one makes batches, others decode shards."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] | None = 5.0
    """How often a training writes down where it stands; 0: after each step, null: never. A killed run goes on
    from there, finished seeds included."""
    store: Annotated[str, Field(min_length=1)] | None = None
    """Where finished shards are kept: a directory, or a URL (s3://bucket/stillroom) that several machines
    share; null: .stillroom, here."""
    local_gb: Annotated[float, Field(gt=0)] | None = None
    """Gigabytes of local disk (.stillroom/nearby) for shards of caches that lie at a URL; null: no limit."""
    decoded_gb: Annotated[float, Field(ge=0)] = 4.0
    """Gigabytes of local disk, for each training of a language model, for shards as they are once decoded: an
    epoch after the first reads these. They are gone with the training. 0: shards are decoded every time."""


class RunPaths(NamedTuple):
    """What a run reads and where it writes. Travels to the processes that train."""

    cache: Path
    dataset: Path
    verified: Path  # the record of the verify stage
    out: Path
    init: Path | None = None  # the trained run whose students this one's start from
    task: str | None = None  # the one of the student's several tasks that is meant
    checkpoints: Path | None = None  # where a training writes down how far it is; None: nowhere
    local_bytes: int | None = None  # of copies of a cache that lies at a URL
    decoded_bytes: int = 0  # of decoded shards, which later epochs read


class Params(Section):
    """All of params.yaml."""

    assets: dict[Name, Asset] = Field(default_factory=dict)
    datasets: dict[Name, Dataset]
    augmented: dict[Name, Augmented] = Field(default_factory=dict)
    teachers: dict[Name, Teacher]
    caches: dict[Name, CacheEntry]
    mixtures: dict[Name, MixtureEntry] = Field(default_factory=dict)
    received: dict[Name, Received] = Field(default_factory=dict)
    students: dict[Name, Student]
    recipes: dict[Name, Recipe]
    runs: dict[Name, Run]
    chained: dict[Name, ChainedRun] = Field(default_factory=dict)
    multitask: dict[Name, config_tasks.Multitask] = Field(default_factory=dict)
    tasks: dict[Name, config_tasks.TaskEntry] = Field(default_factory=dict)
    export: Export = Export()
    workers: Workers = Workers()

    @property
    def every_run(self) -> dict[str, Run]:
        """Runs and chained runs."""
        return {**self.runs, **self.chained}

    @property
    def everything_trained(self) -> dict[str, Run]:
        """All that can be evaluated and exported: runs, chained runs, and each of several tasks."""
        made = {}
        for name, task in self.tasks.items():
            whole = self.multitask[task.run]
            made[name] = TaskRun(**dict(task), student=whole.student, seeds=whole.seeds)
        return {**self.every_run, **made}

    @property
    def every_cache(self) -> dict[str, CacheEntry | MixtureEntry | Received]:
        """Caches, mixtures and what was received: what a run can read."""
        return {**self.caches, **self.mixtures, **self.received}


class _Reference(NamedTuple):
    field: str
    name: str
    shelf: str  # or two, parted by " or "


def load(path: Path = PARAMS) -> Params:
    """The checked content of params.yaml. Raises ConfigError with every fault in it."""
    if not path.is_file():
        raise ConfigError(
            f"there is no {path} here: run this from the project's root, or copy the one in the README."
        )
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML:\n{error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected names like datasets: and runs:")
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        found = "\n".join(f"  {fault}" for fault in faults(error, Params))
        raise ConfigError(f"{path} cannot be used:\n{found}") from None
    if unknown := [r for r in _references(params) if r.name not in _names(params, r)]:
        lines = [
            f"  {r.field}: no {r.name!r} in {r.shelf}{nearest(r.name, _names(params, r))}" for r in unknown
        ]
        raise ConfigError(f"{path} names things that are not on the shelf:\n" + "\n".join(lines))
    if twice := sorted({*params.datasets} & {*params.augmented}):
        raise ConfigError(
            f"{path}: {twice[0]!r} stands in datasets and in augmented: both would be data/{twice[0]}.\n"
            "Give one of them another name."
        )
    if twice := sorted({*params.received} & {*params.caches, *params.mixtures}):
        raise ConfigError(
            f"{path}: {twice[0]!r} stands in received and in caches or mixtures: both would be "
            f"caches/{twice[0]}.\nGive one of them another name."
        )
    if broken := list(_broken_chains(params)):
        raise ConfigError(f"{path} chains runs that do not fit:\n  " + "\n  ".join(broken))
    if circular := list(_circular(params)):
        raise ConfigError(f"{path} mixes caches that cannot be mixed:\n  " + "\n  ".join(circular))
    if unfit := list(config_tasks.misfits(params)):
        raise ConfigError(f"{path} trains tasks together that do not fit:\n  " + "\n  ".join(unfit))
    if wrong := list(misfits(params)):
        raise ConfigError(f"{path} asks teachers for what they cannot give:\n  " + "\n  ".join(wrong))
    return params


def pick(shelf: Mapping[str, Entry], kind: str, name: str) -> Entry:
    """The entry called `name`. Raises ConfigError that names the nearest one."""
    if name not in shelf:
        raise ConfigError(f"no {name!r} in {kind} of {PARAMS}{nearest(name, shelf)}")
    return shelf[name]


def _names(params: Params, reference: _Reference) -> list[str]:
    return [name for shelf in reference.shelf.split(" or ") for name in getattr(params, shelf)]


def _either(params: Params, shelf: str, *others: str) -> str:
    """The shelf, and those of the others that have entries."""
    return " or ".join([shelf, *(other for other in others if getattr(params, other))])


def _references(params: Params) -> Iterator[_Reference]:
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


def _broken_chains(params: Params) -> Iterator[str]:
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


def _circular(params: Params) -> Iterator[str]:
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
