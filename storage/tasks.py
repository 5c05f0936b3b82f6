"""What the format knows of each task."""

from typing import Literal

# Tasks whose logits are those of one distribution over the classes.
AVERAGED = ("sequence-classification", "image-classification")
Task = Literal[
    "sequence-classification", "token-classification", "causal-lm", "masked-lm",
    "image-classification", "multi-label-classification", "regression", "sentence-embedding",
]  # fmt: skip
LANGUAGE: tuple[Task, ...] = ("causal-lm", "masked-lm")  # they speak of a vocabulary
PER_POSITION: tuple[Task, ...] = ("token-classification", *LANGUAGE)  # a row's targets are of its tokens
# Tasks of format 4, with the name of the column that holds the teacher's words.
ROW_COLUMNS: dict[Task, str] = {
    "image-classification": "logits", "multi-label-classification": "logits",
    "regression": "values", "sentence-embedding": "embedding",
}  # fmt: skip
