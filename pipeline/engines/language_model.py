"""The engine of language models: sparse entries of every position's distribution over the vocabulary.

Shape letters: N rows, P positions, V vocabulary.
"""

from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import NotFinite, sparsify_and_measure
from pipeline.config.tasks import TASKS
from pipeline.data import counter_rng
from pipeline.data.counter_rng import Keys
from pipeline.engines.engine import Capabilities, EngineInputs, EngineOutput
from pipeline.engines.hidden_states import Record, no_recording
from pipeline.engines.inference import Advance, Indices, InferenceRequest
from pipeline.engines.language_head import LanguageHead, position_states
from pipeline.engines.loading import load_language_model
from pipeline.engines.masking import TeacherTokens
from pipeline.streaming.model_inputs import input_tensors
from storage.codecs import SparseCodec
from storage.entries import Entries, concatenate, ends
from storage.errors import TeacherError
from storage.records import EntryRows


class LanguageModelEngine:
    """Sparse entries of a distribution over the vocabulary, one at every position that has a target."""

    capabilities: ClassVar = Capabilities(full_logits=True, hidden_states=True)

    def __init__(self, inputs: EngineInputs) -> None:
        assert isinstance(inputs.read, TeacherTokens)
        self._inputs, self._has_target = inputs, inputs.read.has_target

    @cached_property
    def _head(self) -> LanguageHead:
        inputs, spec = self._inputs, self._inputs.spec
        inputs.before_loading()
        model = load_language_model(inputs.teacher, spec.precision, TASKS[spec.task].auto_class)
        inputs.recorder(model, np.arange(0))  # hidden states that the model does not have are refused now
        head = LanguageHead(model, spec.num_outputs)
        shortest = np.array([inputs.tokens.lengths.argmin()])
        head.check(input_tensors(inputs.tokens.padded(shortest, inputs.pad_id)))
        return head

    def load(self) -> None:
        """See TeacherEngine."""
        _ = self._head

    def for_rows(self, inputs: EngineInputs) -> Self:
        """See TeacherEngine."""
        other = type(self)(inputs)
        other._head = self._head
        return other

    def probability_mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """See TeacherEngine."""
        q = self._inputs
        share = 1.0 if q.spec.mask is None else q.spec.mask.share  # of tokens that have a target
        request = q.request(q.first_rows(num_targets / share))
        return probability_mass(self._head, request, self._has_target)

    def answer(self, part: Indices, advance: Advance = lambda rows: None) -> EngineOutput:
        """See TeacherEngine."""
        q, codec = self._inputs, self._inputs.spec.sparse
        assert codec is not None  # the spec of a language model never is
        recorder = q.recorder(self._head.model, part)
        record = recorder.record if recorder else no_recording
        request = q.request(part, advance)
        entries, entropy = infer_entries(self._head, request, self._has_target, codec, record)
        row_ids, lengths = q.row_ids.take(pa.array(part)), q.tokens.lengths[part]
        words = np.repeat(counter_rng.row_words(row_ids.to_pylist()), lengths, axis=0)
        keys = Keys(words, np.concatenate([np.arange(length) for length in lengths]))
        short = lengths.astype(np.int32)
        kept = EntryRows(row_ids, q.tokens.hashes(part), short, short, entries, q.token_ids(part), entropy)
        return EngineOutput(kept, rounding_noise(codec, entries, keys), recorder.found if recorder else {})


@torch.inference_mode()
def infer_entries(
    head: LanguageHead,
    request: InferenceRequest,
    has_target: npt.NDArray[np.bool_],
    codec: SparseCodec,
    record: Record = no_recording,
) -> tuple[Entries, npt.NDArray[np.float32]]:
    """(the entries of every token of these rows, row after row; the sum of the entropies of each row, nats).

    Tokens without a target have no entries. `record` gets the hidden states of all tokens. Raises
    TeacherError where logits are not finite: it names the row.
    """
    rows = request.rows
    assert request.row_ids is not None
    row_ids = [request.row_ids[row] for row in rows]
    words = counter_rng.row_words(row_ids)
    first, num_done = ends(request.inputs.lengths[rows]), 0
    made = [NO_ENTRIES]
    entropies = np.zeros(len(rows))
    place = np.full(first[-1], -1)  # of each token among the positions with a target
    for batch in position_states(head, request, has_target, record):
        place[first[batch.owners] + batch.places] = num_done + np.arange(len(batch.owners))
        num_done += len(batch.owners)
        keys, start = Keys(words[batch.owners], batch.places), 0
        for logits_PV in head.logits(batch.states):
            stop = start + len(logits_PV)
            try:
                entries, entropy = sparsify_and_measure(logits_PV, codec, keys.part(start, stop))
            except NotFinite as error:
                at = start + error.position
                raise _not_finite(row_ids[batch.owners[at]], int(batch.places[at])) from None
            made.append(entries)
            np.add.at(entropies, batch.owners[start:stop], entropy)
            start = stop
    return concatenate(made).take(place + 1), entropies.astype(np.float32)


# One position without entries: every token without a target has these.
NO_ENTRIES = Entries(
    np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32),
    np.zeros(1, np.int32), np.full(1, -np.inf, np.float32),
)  # fmt: skip


@torch.inference_mode()
def probability_mass(
    head: LanguageHead, request: InferenceRequest, has_target: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """The probabilities at all positions of these rows that have a target, summed: [V]."""
    total = np.zeros(head.vocab_size)
    for batch in position_states(head, request, has_target):
        for logits_PV in head.logits(batch.states):
            total += torch.softmax(logits_PV.float(), -1).double().sum(0).cpu().numpy()
    return total


def _not_finite(row_id: str, place: int) -> TeacherError:
    return TeacherError(
        f"the teacher's logits for row {row_id}, token {place}, are not finite.\n"
        "Finished shards are kept. Look at that row; if the arithmetic overflows, set precision: float32."
    )
