"""The whole of params.yaml: its sections, and the entries that name others (runs, chained runs, tasks).

Entries of the other sections are in the files of this room: datasets, teachers, caches, students, recipes.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from pipeline.config.base import Name, Positive, Section, distinct
from pipeline.config.caches import CacheEntry, MixtureEntry, Received
from pipeline.config.datasets import Asset, Augmented, Dataset
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student
from pipeline.config.teachers import Teacher


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


PARAMS = Path("params.yaml")


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


class RunInputs(NamedTuple):
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
    """All of params.yaml. A section that is left out is empty, or has its defaults."""

    assets: dict[Name, Asset] = Field(default_factory=dict)
    datasets: dict[Name, Dataset] = Field(default_factory=dict)
    augmented: dict[Name, Augmented] = Field(default_factory=dict)
    teachers: dict[Name, Teacher] = Field(default_factory=dict)
    caches: dict[Name, CacheEntry] = Field(default_factory=dict)
    mixtures: dict[Name, MixtureEntry] = Field(default_factory=dict)
    received: dict[Name, Received] = Field(default_factory=dict)
    students: dict[Name, Student] = Field(default_factory=dict)
    recipes: dict[Name, Recipe] = Field(default_factory=dict)
    runs: dict[Name, Run] = Field(default_factory=dict)
    chained: dict[Name, ChainedRun] = Field(default_factory=dict)
    multitask: dict[Name, Multitask] = Field(default_factory=dict)
    tasks: dict[Name, TaskEntry] = Field(default_factory=dict)
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
