"""A dry run on the rows that a model is most likely to refuse: an error now, not after hours."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.data.tokenizer import Tokens
from pipeline.teachers.scoring import TeacherRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def try_extremes(model: "PreTrainedModel", teacher_rows: TeacherRows) -> None:
    """Run the model on `extreme_rows`, or on one image. Raises TeacherError where it cannot read them."""
    inputs = teacher_rows.inputs
    rows = extreme_rows(inputs) if isinstance(inputs, Tokens) else np.zeros(1, np.int64)
    teacher_rows.infer(model, rows)


def extreme_rows(tokens: Tokens) -> npt.NDArray[np.int64]:
    """The longest row and the one with the largest token id."""
    largest = int(np.searchsorted(tokens.offsets, tokens.ids.argmax(), side="right")) - 1
    return np.array([int(tokens.lengths.argmax()), largest])
