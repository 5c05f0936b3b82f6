"""A teacher's logits next to the labels of a dataset, and its score on the test split.

Shape letters: N rows, P tokens, C classes, labels or numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.inputs import Inputs
from pipeline.data.rows import NO_LABEL, TEST, Rows
from pipeline.data.tokenizer import NO_WORD, Tokens
from pipeline.engines.inference import Indices, InferenceRequest, infer_rows, infer_tokens
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.objectives.registry import objective_of
from storage.entries import ends, ranges


class TeacherRows(NamedTuple):
    """The rows of a dataset, and what a classifier reads of them."""

    rows: Rows
    inputs: Inputs
    pad_id: int

    def infer(self, model: torch.nn.Module, chosen: Indices) -> npt.NDArray[np.float32]:
        """The logits [N, C] of the chosen rows, or [P, C] of their tokens, by task. In float32."""
        infer = infer_tokens if self.rows.task_spec.engine == "tokens" else infer_rows
        row_ids = self.rows.row_ids.to_pylist()
        return infer(model, InferenceRequest(self.inputs, chosen, self.pad_id, row_ids=row_ids))


def labelled_logits(
    model: torch.nn.Module, teacher_rows: TeacherRows, labels: Sequence[str], chosen: Indices
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """(logits [N, C], labels [N] or numbers [N, C]) of the chosen rows, or of their words, by task.

    `labels` are the names of the model's outputs, in its order; columns come in the dataset's order.
    """
    rows, logits = teacher_rows.rows, teacher_rows.infer(model, chosen)
    if rows.label_names:
        logits = logits[:, [labels.index(label) for label in rows.label_names]]
    if rows.task_spec.engine != "tokens":
        return logits, rows.truth[chosen]
    tokens = teacher_rows.inputs
    assert isinstance(tokens, Tokens)  # words are text
    true_P = token_labels(rows, tokens)[ranges(tokens.offsets[chosen], tokens.lengths[chosen])]
    labelled = true_P != NO_LABEL
    return logits[labelled], true_P[labelled]


def token_labels(rows: Rows, tokens: Tokens) -> npt.NDArray[np.int32]:
    """The label of each token of all rows: its word's tag at the first token of a word, else NO_LABEL.

    `tokens` were read of these rows, with words. Words that were cut off, and words for which the tokenizer
    has no token, have no label. Rows of a pool have no tags.
    """
    assert rows.tags is not None
    assert tokens.words is not None
    owners = np.repeat(np.arange(len(rows.row_ids)), tokens.lengths)
    first = tokens.words != NO_WORD
    first[1:] &= (tokens.words[1:] != tokens.words[:-1]) | (owners[1:] != owners[:-1])
    num_tags = rows.tags.value_lengths().to_numpy()
    first &= num_tags[owners] > 0
    labels = np.full(len(tokens.ids), NO_LABEL, np.int32)
    labels[first] = rows.tags.flatten().to_numpy()[ends(num_tags)[owners[first]] + tokens.words[first]]
    return labels


def score_quality(model: torch.nn.Module, teacher_rows: TeacherRows, labels: Sequence[str]) -> dict[str, Any]:
    """Quality on the test split, for the teacher's record: accuracy where there are classes, else the metrics
    of the task; none where the rows have no labels.
    """
    objective = objective_of(teacher_rows.rows.task)
    if objective is not CLASSIFICATION and not labels:
        return {"quality": {TEST: {}}}
    logits_NC, truth = labelled_logits(model, teacher_rows, labels, teacher_rows.rows.select(TEST))
    if objective is CLASSIFICATION:
        return {"accuracy": {TEST: float((logits_NC.argmax(1) == truth).mean())}}
    return {"quality": {TEST: objective.quality(logits_NC, truth)}}
