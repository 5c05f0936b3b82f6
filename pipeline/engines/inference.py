"""Batched inference of classifiers: rows of tokens or pixels in, logits out.

Rows are sorted by length and cut into batches of a token budget, so that little time goes into padding;
logits come back in the order of the rows. Shape letters: N rows, B batch, L tokens, P positions, C classes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.inputs import Inputs
from pipeline.engines.hidden_states import Record, check_finite, no_recording
from pipeline.streaming.model_inputs import InputTensors, for_transformers, input_tensors
from storage.entries import ends, ranges
from storage.errors import TeacherError

Indices = npt.NDArray[np.int64]
Advance = Callable[[int], None]

# Tokens a batch: on a CPU what fits its caches (32 to 64 short rows were fastest), on a GPU what fills it.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 65_536}


class InferenceRequest(NamedTuple):
    """The rows to run a model on."""

    inputs: Inputs  # of all rows
    rows: Indices  # N, those to run, in the order of the outputs
    pad_id: int
    precision: str = "float32"  # of a classifier: float32, or bfloat16 (autocast)
    row_ids: Sequence[str] | None = None  # of all rows, for errors
    advance: Advance = lambda rows: None  # called with the number of rows of each batch that is done


def infer_rows(
    model: torch.nn.Module, request: InferenceRequest, record: Record = no_recording
) -> npt.NDArray[np.float32]:
    """The logits (or values, or vectors) [N, C] of the rows. `record` is entered around each batch.

    Raises TeacherError where the model cannot read a batch, and where an output is not finite: that error
    names the row.
    """
    rows = request.rows
    logits_NC: npt.NDArray[np.float32] | None = None
    with torch.inference_mode(), _arithmetic(model, request.precision):
        for batch, _, out in _run_batches(model, request, record):
            found = out.logits.float().cpu().numpy()
            check_finite(found, "logits", rows[batch], request.row_ids)
            if logits_NC is None:
                logits_NC = np.empty((len(rows), found.shape[1]), np.float32)
            logits_NC[batch] = found
            request.advance(len(batch))
    if logits_NC is None:
        raise ValueError("no rows were given")
    return logits_NC


def infer_tokens(
    model: torch.nn.Module, request: InferenceRequest, record: Record = no_recording
) -> npt.NDArray[np.float32]:
    """The logits [P, C] of every token of the rows, row after row. Raises as `infer_rows` does."""
    rows, lengths = request.rows, request.inputs.lengths[request.rows]
    first = ends(lengths)
    logits_PC: npt.NDArray[np.float32] | None = None
    with torch.inference_mode(), _arithmetic(model, request.precision):
        for batch, inputs, out in _run_batches(model, request, record):
            found = out.logits[inputs["attention_mask"]].float().cpu().numpy()
            check_finite(found, "logits", np.repeat(rows[batch], lengths[batch]), request.row_ids)
            if logits_PC is None:
                logits_PC = np.empty((first[-1], found.shape[1]), np.float32)
            logits_PC[ranges(first[batch], lengths[batch])] = found
            request.advance(len(batch))
    if logits_PC is None:
        raise ValueError("no rows were given")
    return logits_PC


def batches_by_length(lengths: Indices, tokens_per_batch: int) -> list[Indices]:
    """Places of rows, shortest first, cut so that rows x longest fits the budget (one row at least)."""
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
        numbers = {name: value for name, value in inputs.items() if value.dtype != torch.bool}
        largest = ", ".join(f"{name} up to {int(value.max())}" for name, value in numbers.items())
        raise TeacherError(
            f"the teacher cannot read rows of length {length} ({largest}): {error}\n"
            "Lower max_length to its positions, or give it the tokenizer that it was made with."
        ) from error


def _arithmetic(model: torch.nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


def _run_batches(
    model: torch.nn.Module, request: InferenceRequest, record: Record
) -> Iterator[tuple[Indices, InputTensors, Any]]:
    """(places in `rows`, what the model reads, its output) of batches of similar lengths."""
    device, rows = next(model.parameters()).device, request.rows
    for batch in batches_by_length(request.inputs.costs[rows], TOKENS_PER_BATCH[device.type]):
        inputs = input_tensors(request.inputs.padded(rows[batch], request.pad_id), device)
        with explain_unreadable(inputs), record(batch, inputs):
            out = model(**for_transformers(inputs))
        yield batch, inputs, out
