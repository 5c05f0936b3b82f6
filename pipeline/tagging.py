"""Where rows are labelled, and what a teacher says there: at rows, or at the first tokens of words."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import engine
from pipeline.data import NO_LABEL, Rows
from pipeline.inputs import Inputs
from pipeline.tokens import NO_WORD, Tokens
from storage.entries import ends, ranges


def token_labels(rows: Rows, tokens: Tokens) -> npt.NDArray[np.int32]:
    """The label of each token of all rows: its word's tag at the first token of a word, else NO_LABEL.

    `tokens` were read of these rows, with words. Words that were cut off, or of which the tokenizer makes
    nothing, have no token. Rows of a pool have no tags.
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


def where_labelled(
    model: torch.nn.Module, rows: Rows, tokens: Inputs, chosen: npt.NDArray[np.int64], pad_id: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """(logits [N, C] in float32, labels [N] or numbers [N, C]): of the chosen rows, or of their words, by
    task.
    """
    names = rows.row_ids.to_pylist()
    if rows.task != "token-classification":
        logits = engine.infer(model, tokens, chosen, pad_id, "float32", names=names).logits
        return logits, rows.truth[chosen]
    assert isinstance(tokens, Tokens)  # words are text
    labels = token_labels(rows, tokens)[ranges(tokens.offsets[chosen], tokens.lengths[chosen])]
    judged = labels != NO_LABEL
    return engine.infer_tokens(model, tokens, chosen, pad_id, "float32", names)[judged], labels[judged]
