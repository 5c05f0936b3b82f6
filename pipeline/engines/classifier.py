"""Batched inference: rows of tokens or pixels -> what the teacher says about each.

Rows are sorted by length and cut into batches of a token budget, so little is spent on padding; answers come
back in the order of the rows. Shape letters: N rows, B batch, L tokens, P positions, C classes, W width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import sparsify
from pipeline.data import counter_rng
from pipeline.data.counter_rng import Keys
from pipeline.data.inputs import Inputs
from pipeline.data.tokenizer import Tokens
from pipeline.engines.engine import Advance, EngineInputs, EngineOutput, Indices
from pipeline.engines.hidden_states import HiddenStateRecorder, Record, check_finite, no_recording
from pipeline.engines.loading import load_classifier
from pipeline.streaming.model_inputs import InputTensors, for_transformers, input_tensors
from storage.entries import ends, ranges
from storage.errors import TeacherError
from storage.records import EntryRows, LogitRows
from storage.spec import HiddenSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TeacherOutput(NamedTuple):
    """Answers for N rows, in their order."""

    logits: npt.NDArray[np.float32]  # N x C, before any softmax
    hidden: dict[str, npt.NDArray[np.float32]]  # name -> N x W pooled; P x W, one a token, row after row


class ClassifierEngine:
    """One target a row, or one a token, of all classes."""

    def __init__(self, questions: EngineInputs) -> None:
        self._q = questions

    @cached_property
    def _model(self) -> "PreTrainedModel":
        self._q.before_loading()
        q, how = self._q, self._q.spec.image or self._q.spec.embedding
        model = load_classifier(q.teacher, task=q.spec.task, how=how, pad_token_id=q.pad_id)
        q.overheard(model, np.arange(0))  # what it has none of is refused now
        return model

    def load(self) -> None:
        """Loads the model now."""
        _ = self._model

    def about(self, questions: EngineInputs) -> "ClassifierEngine":
        """The same model over other rows."""
        other = ClassifierEngine(questions)
        other._model = self._model
        return other

    def mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """See TeacherEngine."""
        said = self._infer(np.arange(min(num_targets, len(self._q.row_ids))))
        found: npt.NDArray[np.float64] = (
            torch.softmax(torch.from_numpy(said.logits).double(), -1).sum(0).numpy()
        )
        return found

    def ask(self, part: Indices, advance: Advance = lambda rows: None) -> EngineOutput:
        """See TeacherEngine."""
        q, row_ids = self._q, self._q.row_ids.take(pa.array(part))
        inputs, lengths = q.inputs.hashes(part), q.inputs.lengths[part].astype(np.int32)
        if q.spec.per_position:
            names, heard = q.row_ids.to_pylist(), q.overheard(self._model, part)
            logits = infer_tokens(
                self._model, q.tokens, part, q.pad_id, q.spec.precision, names, advance,
                heard.hear if heard else no_recording,
            )  # fmt: skip
            kept_logits = LogitRows(row_ids, inputs, lengths, logits, q.read(part))
            return EngineOutput(kept_logits, None, heard.found if heard else {})
        said = self._infer(part, advance)
        codec = q.spec.sparse
        if codec is None:
            return EngineOutput(LogitRows(row_ids, inputs, lengths, said.logits), None, said.hidden)
        keys = Keys(counter_rng.row_words(row_ids.to_pylist()), np.zeros(len(part), np.int64))
        entries = sparsify(torch.from_numpy(said.logits), codec, keys)
        kept = EntryRows(row_ids, inputs, lengths, np.ones(len(part), np.int32), entries)
        return EngineOutput(kept, rounding_noise(codec, entries, keys), said.hidden)

    def _infer(self, part: Indices, advance: Advance = lambda rows: None) -> TeacherOutput:
        q = self._q
        names = q.row_ids.to_pylist()
        return infer_rows(
            self._model, q.inputs, part, q.pad_id, q.spec.precision, q.spec.hidden, names, advance
        )


# Tokens a batch: on a CPU what stays in its caches (32 to 64 short rows were fastest), on a GPU what fills
# it.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65_536}


def infer_rows(
    model: torch.nn.Module,
    tokens: Inputs,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    precision: str,
    hidden: HiddenSpec | None = None,
    names: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> TeacherOutput:
    """The teacher's logits (or values, or vectors), and hidden states if asked, for `rows` of `tokens`.

    `precision` is float32 or bfloat16 (autocast). `names` are the row ids, for errors. `advance` is told how
    many rows are done. Raises TeacherError where the model cannot read a batch, and where an answer is not
    finite: that one names the row.
    """
    logits_NC: npt.NDArray[np.float32] | None = None
    heard = (
        HiddenStateRecorder(model, hidden, tokens.lengths[rows], rows, names) if hidden is not None else None
    )
    with torch.inference_mode(), _arithmetic(model, precision):
        for batch, _, out in _run_batches(model, tokens, rows, pad_id, heard.hear if heard else no_recording):
            answer = out.logits.float().cpu().numpy()
            check_finite(answer, "logits", rows[batch], names)
            if logits_NC is None:
                logits_NC = np.empty((len(rows), answer.shape[1]), np.float32)
            logits_NC[batch] = answer
            advance(len(batch))
    if logits_NC is None:
        raise ValueError("no rows were given")
    return TeacherOutput(logits_NC, heard.found if heard else {})


def infer_tokens(
    model: torch.nn.Module,
    tokens: Tokens,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    precision: str,
    names: Sequence[str] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
    hear: Record = no_recording,
) -> npt.NDArray[np.float32]:
    """The teacher's logits [P, C] for every token of `rows`, row after row. All else is as in `infer`, but
    hidden states go to `hear`.
    """
    lengths = tokens.lengths[rows]
    first = ends(lengths)
    logits_PC: npt.NDArray[np.float32] | None = None
    with torch.inference_mode(), _arithmetic(model, precision):
        for batch, inputs, out in _run_batches(model, tokens, rows, pad_id, hear):
            answer = out.logits[inputs["attention_mask"]].float().cpu().numpy()
            check_finite(answer, "logits", np.repeat(rows[batch], lengths[batch]), names)
            if logits_PC is None:
                logits_PC = np.empty((first[-1], answer.shape[1]), np.float32)
            logits_PC[ranges(first[batch], lengths[batch])] = answer
            advance(len(batch))
    if logits_PC is None:
        raise ValueError("no rows were given")
    return logits_PC


def batches_by_length(lengths: npt.NDArray[np.int64], tokens_per_batch: int) -> list[npt.NDArray[np.int64]]:
    """Positions of rows, shortest first, cut so that rows x longest stays in the budget (at least one)."""
    order = np.argsort(lengths, kind="stable")
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > tokens_per_batch:
            batches.append(order[start:end])
            start = end
    return batches


@contextlib.contextmanager
def explain_unreadable(inputs: InputTensors) -> Iterator[None]:
    """Raise TeacherError where the model fails on a batch: rows too long for it, or ids that it lacks."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        length = next(iter(inputs.values())).shape[1]
        largest = ", ".join(f"{name} up to {int(value.max())}" for name, value in inputs.items())
        raise TeacherError(
            f"the teacher cannot read rows of length {length} ({largest}): {error}\n"
            "Lower max_length to its positions, or give it the tokenizer that it was made with."
        ) from error


def _arithmetic(model: torch.nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def _run_batches(
    model: torch.nn.Module, tokens: Inputs, rows: npt.NDArray[np.int64], pad_id: int, hear: Record
) -> Iterator[tuple[npt.NDArray[np.int64], InputTensors, Any]]:
    """(places in `rows`, what the model reads, its output) of each batch of like lengths."""
    device = next(model.parameters()).device
    for batch in batches_by_length(tokens.costs[rows], TOKENS_PER_BATCH[device.type]):
        inputs = input_tensors(tokens.padded(rows[batch], pad_id), device)
        with explain_unreadable(inputs), hear(batch, inputs):
            out = model(**for_transformers(inputs))
        yield batch, inputs, out
