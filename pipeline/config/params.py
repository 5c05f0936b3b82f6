"""All of params.yaml: its sections, and the entries that name others (runs, chained runs, tasks).

Entries of the other sections are in the other files of this room: datasets, teachers, caches, students,
recipes.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from pipeline.config.base import Name, Positive, Section, Seeds
from pipeline.config.caches import CacheEntry, MixtureEntry, Received
from pipeline.config.datasets import Asset, Augmented, Dataset
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student
from pipeline.config.teachers import Teacher


class TaskEntry(Section):
    """One part of a multitask run: its dataset, cache and recipe."""

    run: Name
    """An entry of multitask."""
    dataset: Name
    cache: Name
    """An entry of caches or mixtures."""
    recipe: Name
    """Its losses and batch_rows are those of this part; the recipes of a run agree on epochs and schedule."""


class Multitask(Section):
    """One student with an output layer for each of several tasks (Caruana 1997; Liu et al. 2019)."""

    student: Name
    weights: Annotated[dict[Name, Annotated[float, Field(gt=0)]], Field(min_length=2)]
    """Weight of the loss of each part: all entries of tasks that name this run. Only ratios matter."""
    seeds: Seeds = (0,)


PARAMS = Path("params.yaml")


class Run(Section):
    """cache x student x recipe x seeds, over the labels and splits of a dataset."""

    dataset: Name
    """Labels and splits; usually the dataset that the cache was made from."""
    cache: Name
    """An entry of caches, mixtures or received."""
    student: Name
    recipe: Name
    seeds: Seeds = (0,)


class ChainedRun(Run):
    """A run whose students start from those of another run, with the same student and tokenizer.

    It has its own section because DVC gives all entries of a section the same kinds of dependencies.
    """

    init: Name
    """The run, chained or not, that is trained before. Seed s starts from its seed s, or from its only
    seed."""


class TaskRun(Run):
    """A part of a multitask run, as a run: so it is evaluated and exported like any other."""

    run: Name
    """The entry of multitask that trains its student."""


class Export(Section):
    """Limits of exported models."""

    int8_max_loss: Annotated[float, Field(ge=0)] = 1.0
    """Most points of accuracy that int8 may lose on the test split; an export that loses more is refused."""


class Workers(Section):
    """How work is spread over one machine or several. It never changes a result. See docs/workers.md."""

    capture: Annotated[str, Field(pattern=r"^(inline|local|(tcp|tls|ws|wss)://\S+)$")] = "inline"
    """Where teachers run: `inline`, in the process of the stage; `local`, in processes of this machine; or
    the address of a Dask scheduler, like tcp://10.0.0.1:8786, whose workers see the same directories."""
    threads: Positive | None = None
    """Threads of arithmetic of each teacher, inline too; null: all cores of this machine. The number is never
    derived from that of processes: another number of threads may round differently."""
    processes: Positive | None = None
    """`local`: processes, each with its own teacher; null: one a GPU or, without GPUs, cores / threads."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """`local`: number of GPUs, the first visible ones, a process each; null: all."""
    shard_timeout: Positive = 3600
    """Seconds between the assignment of a shard and its result. A shard that takes longer goes to another
    worker, and its worker is restarted. Each worker has two shards, so one may take half of this."""
    seeds_at_once: Positive | None = None
    """Seeds of a run that train at the same time, each on one thread; null: two a core."""
    readers: Annotated[int, Field(ge=0)] = 1
    """Threads that read the cache for a training: one makes batches, the others decode shards."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] | None = 5.0
    """Minutes between checkpoints of a training; 0: after each step, null: never. A killed run continues from
    the last one; finished seeds are kept."""
    store: Annotated[str, Field(min_length=1)] | None = None
    """Where finished shards are kept: a directory, or a URL (s3://bucket/stillroom) that machines share;
    null: .stillroom in the project."""
    local_gb: Annotated[float, Field(gt=0)] | None = None
    """Gigabytes of local disk (.stillroom/nearby) for copies of shards of caches at a URL; null: no limit."""
    decoded_gb: Annotated[float, Field(ge=0)] = 4.0
    """Gigabytes of local disk, for each training of a language model, for decoded shards: epochs after the
    first read these. They are deleted with the training. 0: shards are decoded in every epoch."""


class RunInputs(NamedTuple):
    """What a run reads and where it writes. It is sent to the processes that train."""

    cache: Path
    dataset: Path
    verified: Path  # the record of the verify stage
    out: Path
    init: Path | None = None  # the trained run whose students these start from
    task: str | None = None  # the part of a multitask run
    checkpoints: Path | None = None  # a directory; None: no checkpoints
    local_bytes: int | None = None  # limit of local copies of a cache at a URL
    decoded_bytes: int = 0  # limit of decoded shards, which later epochs read


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
        """All that is evaluated and exported: runs, chained runs, and the parts of multitask runs."""
        parts = {}
        for name, part in self.tasks.items():
            whole = self.multitask[part.run]
            parts[name] = TaskRun(**dict(part), student=whole.student, seeds=whole.seeds)
        return {**self.every_run, **parts}
