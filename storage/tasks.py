"""What the format knows of each task, a row a task: `STORED_TASKS`.

pipeline/config/tasks.py has the other half.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

# Fields of a spec that some tasks have and all others have not.
Part = Literal["vocab_size", "mask", "image", "embedding"]


class StoredTask(NamedTuple):
    """How a cache keeps the targets of a task."""

    per_position: bool  # targets belong to a row's tokens; else one target a row
    min_labels: int  # names of the numbers of a target; 0: it has none, and any label is refused
    codecs: Literal["dense", "sparse", "any"]  # those that can keep its targets
    averaged: bool  # whether a mixture can hold it: dense targets are logits of one distribution a row
    format_version: int  # the first that has the task
    parts: tuple[Part, ...] = ()  # fields of the spec that this task has; it lacks all others of `Part`
    column: str = "logits"  # of a dense shard: what a row's numbers are called

    @property
    def is_language_model(self) -> bool:
        """Whether targets are distributions over a vocabulary."""
        return "vocab_size" in self.parts


# fmt: off
STORED_TASKS: dict[str, StoredTask] = {
    # per_position, min_labels, codecs, averaged, format_version, parts, column
    "sequence-classification":    StoredTask(False, 2, "any",    True,  1),
    "token-classification":       StoredTask(True,  2, "dense",  False, 3),
    "causal-lm":                  StoredTask(True,  0, "sparse", False, 3, ("vocab_size",)),
    "masked-lm":                  StoredTask(True,  0, "sparse", False, 3, ("vocab_size", "mask")),
    "image-classification":       StoredTask(False, 2, "any",    True,  4, ("image",)),
    "multi-label-classification": StoredTask(False, 2, "dense",  False, 4),
    "regression":                 StoredTask(False, 1, "dense",  False, 4, (), "values"),
    "sentence-embedding":         StoredTask(False, 0, "dense",  False, 4, ("embedding",), "embedding"),
}
# fmt: on


# The name of a task. mypy cannot read the names off the table.
if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[tuple(STORED_TASKS)]
