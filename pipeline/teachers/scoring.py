"""A teacher's score on the test split, of rows or of the first tokens of words."""

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.inputs import Inputs
from pipeline.data.rows import NO_LABEL, Rows
from pipeline.data.tokenizer import NO_WORD, Tokens
from pipeline.engines.inference import InferenceRequest, infer_rows, infer_tokens
from pipeline.engines.language_head import LanguageHead, position_states
from pipeline.objectives.base import binned_error
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.objectives.language_model import LanguageModelScores
from pipeline.objectives.registry import objective_of
from storage.entries import ends, ranges

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def try_extremes(model: "PreTrainedModel", tokens: Inputs, pad_id: int) -> None:
    """Run the longest row, and the one with the largest token id."""
    if not isinstance(tokens, Tokens):  # images are all alike
        infer_rows(model, InferenceRequest(tokens, np.zeros(1, np.int64), pad_id))
    elif tokens.words is None:
        infer_rows(model, InferenceRequest(tokens, extreme_rows(tokens), pad_id))
    else:
        infer_tokens(model, InferenceRequest(tokens, extreme_rows(tokens), pad_id))


def extreme_rows(tokens: Tokens) -> npt.NDArray[np.int64]:
    """The longest row and the one with the largest token id: better refused now than after hours."""
    largest = int(np.searchsorted(tokens.offsets, tokens.ids.argmax(), side="right")) - 1
    return np.array([int(tokens.lengths.argmax()), largest])


def score_quality(
    model: "PreTrainedModel", rows: Rows, tokens: Inputs, pad_id: int, names: tuple[str, ...]
) -> dict[str, Any]:
    """How good it is on the test split: accuracy where there are classes, else the metrics of the task."""
    if objective_of(rows.task) is CLASSIFICATION:
        return {"accuracy": {"test": _score(model, rows, tokens, pad_id, names, "test")}}
    if not names:
        return {"quality": {"test": {}}}
    said, truth = labelled_logits(model, rows, tokens, rows.select("test"), pad_id)
    order = [names.index(label) for label in rows.label_names]
    return {"quality": {"test": objective_of(rows.task).quality(said[:, order], truth)}}


def _score(
    model: "PreTrainedModel", rows: Rows, tokens: Inputs, pad_id: int, names: tuple[str, ...], split: str
) -> float:
    """Accuracy on a split, by label name: the teacher's order of labels may be another."""
    logits, labels = labelled_logits(model, rows, tokens, rows.select(split), pad_id)
    said: npt.NDArray[np.str_] = np.array(names)[logits.argmax(1)]
    return float((said == np.array(rows.label_names)[labels]).mean())


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


def labelled_logits(
    model: torch.nn.Module, rows: Rows, tokens: Inputs, chosen: npt.NDArray[np.int64], pad_id: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """(logits [N, C] in float32, labels [N] or numbers [N, C]): of the chosen rows, or of their words, by
    task.
    """
    request = InferenceRequest(tokens, chosen, pad_id, row_ids=rows.row_ids.to_pylist())
    if rows.task_spec.engine != "tokens":
        return infer_rows(model, request), rows.truth[chosen]
    assert isinstance(tokens, Tokens)  # words are text
    labels = token_labels(rows, tokens)[ranges(tokens.offsets[chosen], tokens.lengths[chosen])]
    judged = labels != NO_LABEL
    return infer_tokens(model, request)[judged], labels[judged]


@torch.inference_mode()
def score_language_model(
    head: LanguageHead,
    request: InferenceRequest,
    has_target: npt.NDArray[np.bool_],
    truth: npt.NDArray[np.int32],
) -> LanguageModelScores:
    """Loss, accuracy and calibration over all positions of these rows that have a target.

    `has_target` and `truth` are of each token of all rows; `truth` is the right id at its position.
    """
    tokens = request.inputs
    assert isinstance(tokens, Tokens)
    total, seconds_scoring = 0.0, 0.0
    confidences: list[npt.NDArray[np.float32]] = []
    correct: list[npt.NDArray[np.bool_]] = []
    started = time.perf_counter()
    for batch in position_states(head, request, has_target):
        true = truth[tokens.offsets[request.rows[batch.owners]] + batch.places].astype(np.int64)
        start = 0
        for logits_PV in head.logits(batch.states):
            true_P = torch.from_numpy(true[start : start + len(logits_PV)]).to(logits_PV.device)
            log_probs_PV = logits_PV.float().log_softmax(-1)
            best = log_probs_PV.max(-1)
            began = time.perf_counter()
            total -= log_probs_PV.gather(1, true_P[:, None]).sum().item()
            confidences.append(best.values.exp().cpu().numpy())
            correct.append((best.indices == true_P).cpu().numpy())
            start += len(logits_PV)
            seconds_scoring += time.perf_counter() - began
    seconds = time.perf_counter() - started - seconds_scoring
    confidence, right = np.concatenate(confidences), np.concatenate(correct)
    return LanguageModelScores(
        loss=total / len(right),
        accuracy=float(right.mean()),
        ece=binned_error(confidence, right),
        agreement=None,
        kl_to_teacher=None,
        tokens_per_second=len(right) / seconds,
    )
