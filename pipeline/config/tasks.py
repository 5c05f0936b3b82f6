"""What is special about each task, a row a task: `TASKS`.

Rooms read the fields of a row and never compare a task's name. storage/tasks.py has the half that the cache
format needs. Losses and metrics are in a file of pipeline/objectives, one an objective.
"""

from typing import Literal, NamedTuple, get_args

from storage.tasks import STORED_TASKS, StoredTask, Task

# Text: a row is a text. Words: a text whose words count. Documents: texts that may be cut into blocks.
ModelInputs = Literal["text", "words", "documents", "images"]
# Of each row: one class, any number of classes, numbers, a class for each word, or nothing.
Labels = Literal["class", "set", "numbers", "tags", "none"]
ObjectiveName = Literal["classification", "multilabel", "regression", "embedding", "language_model"]
# Objectives of one target a row.
ROW_OBJECTIVES: tuple[ObjectiveName, ...] = ("classification", "multilabel", "regression", "embedding")
Engine = Literal["rows", "tokens", "language_model"]

# Of distributions over classes: functions of DIVERGENCES in pipeline/losses/divergences.py.
ClassDivergence = Literal["forward", "reverse", "jsd", "skewed"]
CLASS_DIVERGENCES: tuple[str, ...] = get_args(ClassDivergence)


class TaskSpec(NamedTuple):
    """One row of `TASKS`."""

    inputs: ModelInputs  # what a row of a dataset is
    labels: Labels  # what a row of a dataset is labelled with: names a reader of pipeline/data/labels.py
    engine: Engine  # runs its teachers: an entry of ENGINES (pipeline/engines/registry.py)
    objective: ObjectiveName  # of its students: an entry of OBJECTIVES (pipeline/objectives/registry.py)
    stored: StoredTask  # what the cache format knows of it
    auto_class: str  # of transformers: it loads its teachers
    trainable: bool  # whether teachers are fine-tuned here; others are taken as they are
    problem_type: str | None = None  # what transformers calls it; None: it needs no name
    divergences: tuple[str, ...] = CLASS_DIVERGENCES  # of student and teacher that a recipe may name
    tempered: bool = True  # whether the soft loss has a temperature
    first_choice: bool = True  # whether a target has one most likely class: pseudo-labels, confidence
    inferred: bool = False  # whether summary.json leaves its name out: see `inferred_task`

    @property
    def has_label_loss(self) -> bool:
        """Whether there are labels to learn from: those of rows, or the next tokens of documents."""
        return self.labels != "none" or self.engine == "language_model"

    @property
    def masked(self) -> bool:
        """Whether its teachers read rows with some tokens masked, and have targets for these alone."""
        return "mask" in self.stored.parts

    @property
    def predicts_next(self) -> bool:
        """Whether the target of a position is about the token after it."""
        return self.engine == "language_model" and not self.masked

    @property
    def makes_vectors(self) -> bool:
        """Whether its teachers make a vector of each row."""
        return "embedding" in self.stored.parts


# fmt: off
TASKS: dict[Task, TaskSpec] = {
    "sequence-classification": TaskSpec(
        "text", "class", "rows", "classification", STORED_TASKS["sequence-classification"],
        "AutoModelForSequenceClassification", trainable=True, inferred=True,
    ),
    "token-classification": TaskSpec(
        "words", "tags", "tokens", "classification", STORED_TASKS["token-classification"],
        "AutoModelForTokenClassification", trainable=False,
    ),
    "causal-lm": TaskSpec(
        "documents", "none", "language_model", "language_model", STORED_TASKS["causal-lm"],
        "AutoModelForCausalLM", trainable=False, tempered=False, inferred=True,
    ),
    "masked-lm": TaskSpec(
        "text", "none", "language_model", "language_model", STORED_TASKS["masked-lm"],
        "AutoModelForMaskedLM", trainable=False, tempered=False,
    ),
    "image-classification": TaskSpec(
        "images", "class", "rows", "classification", STORED_TASKS["image-classification"],
        "AutoModelForImageClassification", trainable=True,
    ),
    "multi-label-classification": TaskSpec(
        "text", "set", "rows", "multilabel", STORED_TASKS["multi-label-classification"],
        "AutoModelForSequenceClassification", trainable=True, problem_type="multi_label_classification",
        divergences=("forward",), first_choice=False,
    ),
    "regression": TaskSpec(
        "text", "numbers", "rows", "regression", STORED_TASKS["regression"],
        "AutoModelForSequenceClassification", trainable=True, problem_type="regression",
        divergences=("mse",), tempered=False, first_choice=False,
    ),
    "sentence-embedding": TaskSpec(
        "text", "none", "rows", "embedding", STORED_TASKS["sentence-embedding"],
        "AutoModel", trainable=False,
        divergences=("cosine", "mse"), tempered=False, first_choice=False,
    ),
}
# fmt: on
DEFAULT_TASK: Task = "sequence-classification"


def tasks_with(**fields: object) -> str:
    """The names of the tasks whose row has these values, as text for an error: "a or b"."""
    return " or ".join(
        name for name, task in TASKS.items() if all(getattr(task, f) == value for f, value in fields.items())
    )


def inferred_task(has_labels: bool) -> Task:
    """The task of a prepared dataset whose summary.json names none."""
    return next(
        name for name, task in TASKS.items() if task.inferred and (task.labels != "none") == has_labels
    )
