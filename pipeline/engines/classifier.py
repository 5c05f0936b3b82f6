"""Engines of classifiers, regressors and encoders of rows: one target a row, or one a token."""

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import sparsify
from pipeline.data import counter_rng
from pipeline.data.counter_rng import Keys
from pipeline.engines.engine import Capabilities, EngineInputs, EngineOutput
from pipeline.engines.hidden_states import no_recording
from pipeline.engines.inference import Advance, Indices, infer_rows, infer_tokens
from pipeline.engines.loading import load_classifier
from storage.records import EntryRows, LogitRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _ClassifierEngine:
    """What the engines of this file share: a model that is loaded once."""

    capabilities: ClassVar = Capabilities(full_logits=True, hidden_states=True)

    def __init__(self, inputs: EngineInputs) -> None:
        self._inputs = inputs

    @cached_property
    def _model(self) -> "PreTrainedModel":
        q, spec = self._inputs, self._inputs.spec
        q.before_loading()
        reading = spec.image or spec.embedding
        model = load_classifier(q.teacher, task=spec.task, reading=reading, pad_token_id=q.pad_id)
        q.recorder(model, np.arange(0))  # hidden states that the model does not have are refused now
        return model

    def load(self) -> None:
        """See TeacherEngine."""
        _ = self._model

    def for_rows(self, inputs: EngineInputs) -> Self:
        """See TeacherEngine."""
        other = type(self)(inputs)
        other._model = self._model
        return other


class RowEngine(_ClassifierEngine):
    """One target a row: logits of all classes, values, or a vector."""

    def probability_mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """See TeacherEngine."""
        first = np.arange(min(num_targets, len(self._inputs.row_ids)))
        return _summed_probabilities(infer_rows(self._model, self._inputs.request(first)))

    def answer(self, part: Indices, advance: Advance = lambda rows: None) -> EngineOutput:
        """See TeacherEngine."""
        q, row_ids = self._inputs, self._inputs.row_ids.take(pa.array(part))
        recorder = q.recorder(self._model, part)
        logits_NC = infer_rows(
            self._model, q.request(part, advance), recorder.record if recorder else no_recording
        )
        hidden = recorder.found if recorder else {}
        hashes, lengths = q.inputs.hashes(part), q.inputs.lengths[part].astype(np.int32)
        codec = q.spec.sparse
        if codec is None:
            return EngineOutput(LogitRows(row_ids, hashes, lengths, logits_NC), None, hidden)
        keys = Keys(counter_rng.row_words(row_ids.to_pylist()), np.zeros(len(part), np.int64))
        entries = sparsify(torch.from_numpy(logits_NC), codec, keys)
        kept = EntryRows(row_ids, hashes, lengths, np.ones(len(part), np.int32), entries)
        return EngineOutput(kept, rounding_noise(codec, entries, keys), hidden)


class TokenEngine(_ClassifierEngine):
    """One target a token: logits of all classes."""

    def probability_mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """See TeacherEngine."""
        first = self._inputs.first_rows(num_targets)
        return _summed_probabilities(infer_tokens(self._model, self._inputs.request(first)))

    def answer(self, part: Indices, advance: Advance = lambda rows: None) -> EngineOutput:
        """See TeacherEngine."""
        q, recorder = self._inputs, self._inputs.recorder(self._model, part)
        logits_PC = infer_tokens(
            self._model, q.request(part, advance), recorder.record if recorder else no_recording
        )
        row_ids, lengths = q.row_ids.take(pa.array(part)), q.tokens.lengths[part].astype(np.int32)
        kept = LogitRows(row_ids, q.tokens.hashes(part), lengths, logits_PC, q.token_ids(part))
        return EngineOutput(kept, None, recorder.found if recorder else {})


def _summed_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Softmax of each row of logits, summed over the rows."""
    total: npt.NDArray[np.float64] = torch.softmax(torch.from_numpy(logits).double(), -1).sum(0).numpy()
    return total
