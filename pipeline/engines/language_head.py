"""A language model's states, and its logits a chunk of positions at a time.

The model runs as it is, but its head reads one position only; a hook copies the states that the head would
have read, and they go through the head a chunk at a time. So [batch, length, vocabulary] never exists. What a
model does to its logits after the head (soft-caps, scales) is done to each chunk, and a first small batch is
compared with the model's own logits before anything else is computed.

Shape letters: B batch, L tokens, P positions, D width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.tokenizer import Tokens
from pipeline.engines.hidden_states import Record, no_recording
from pipeline.engines.inference import (
    TOKENS_PER_BATCH,
    InferenceRequest,
    batches_by_length,
    explain_unreadable,
)
from pipeline.streaming.model_inputs import InputTensors, for_transformers, input_tensors, on_device
from storage.entries import ranges
from storage.errors import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # of logits at a time, as float32
CHECKED_TOKENS = 16  # of a row: enough to see what is done to logits
AGREE = 2e-2  # largest difference of log-probabilities, in bfloat16; float32 is far below


class LanguageHead:
    """A language model's states, and its logits from them a chunk at a time."""

    def __init__(self, model: "PreTrainedModel", vocab_size: int) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise TeacherError(
                f"{type(model).__name__} has no output embeddings: it is not a language model.\n"
                "Take a model with a vocabulary head (AutoModelForCausalLM, AutoModelForMaskedLM)."
            )
        self.model, self.vocab_size = model, vocab_size
        self._head = head
        self._behind = _behind_the_head(model.config)

    def states(self, inputs: InputTensors) -> torch.Tensor:
        """The states that the head reads: [B, L, D]."""
        with self._head_inputs() as kept:
            self.model(**for_transformers(inputs))
        return kept[0]

    def next_logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The logits of what follows one row of ids [1, L]: [V]."""
        device = next(self.model.parameters()).device
        inputs = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
        states_BLD = self.states(on_device(inputs, device))
        return next(self.logits(states_BLD[0, -1:]))[0]

    def logits(self, states_PD: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits of these states [<= chunk, V], in order; padding of the vocabulary is cut off."""
        width = 4 * self._head.weight.shape[0]
        chunk = max(1, CHUNK_BYTES.get(states_PD.device.type, CHUNK_BYTES["cpu"]) // width)
        for start in range(0, len(states_PD), chunk):
            yield self._behind(self._head(states_PD[start : start + chunk]))[:, : self.vocab_size]

    @torch.inference_mode()
    def check(self, inputs: InputTensors) -> None:
        """Raise TeacherError where log-probabilities from chunks differ from those of the model itself.

        Compares a few tokens of each row only: the matrix of their logits is made.
        """
        device = next(self.model.parameters()).device
        inputs = {name: value[:, :CHECKED_TOKENS].to(device) for name, value in inputs.items()}
        mask_BL = inputs["attention_mask"].bool()
        whole = self.model(**for_transformers(inputs)).logits[mask_BL][:, : self.vocab_size]
        in_chunks = torch.cat(list(self.logits(self.states(inputs)[mask_BL])))
        apart = (whole.float().log_softmax(-1) - in_chunks.float().log_softmax(-1)).abs().max().item()
        if not apart <= AGREE * max(1.0, whole.abs().max().item()):
            raise TeacherError(
                f"{type(self.model).__name__} changes its logits in a way that is unknown here: "
                f"log-probabilities are {apart:.3g} apart.\n"
                "Known are final_logit_softcapping, logit_scale and logits_scaling of its config."
            )

    @contextlib.contextmanager
    def _head_inputs(self) -> Iterator[list[torch.Tensor]]:
        kept: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            kept.append(args[0])
            return (args[0][:, :1],)

        handle = self._head.register_forward_pre_hook(keep)
        try:
            yield kept
        finally:
            handle.remove()


class PositionStates(NamedTuple):
    """Positions of a batch that have a target, row after row."""

    owners: npt.NDArray[np.int64]  # P, index into the rows of the request
    places: npt.NDArray[np.int64]  # P, place in its row
    states: torch.Tensor  # P x D


def position_states(
    head: LanguageHead,
    request: InferenceRequest,
    has_target: npt.NDArray[np.bool_],
    record: Record = no_recording,
) -> Iterator[PositionStates]:
    """The states of the positions of these rows that have a target, a batch of similar lengths at a time.

    `has_target`: of each token of all rows. Rows never attend to each other: each is a sequence of its own,
    with positions from 0. `record` is entered around each batch.
    """
    device, rows = next(head.model.parameters()).device, request.rows
    tokens = request.inputs
    assert isinstance(tokens, Tokens)
    for batch in batches_by_length(tokens.lengths[rows], TOKENS_PER_BATCH[device.type]):
        arrays = tokens.padded(rows[batch], request.pad_id)
        mask_BL = arrays["attention_mask"]
        chosen_BL, own = mask_BL.copy(), ranges(tokens.offsets[rows[batch]], tokens.lengths[rows[batch]])
        chosen_BL[mask_BL] = has_target[own]
        inputs = input_tensors(arrays, device)
        with explain_unreadable(inputs), record(batch, inputs):
            states_BLD = head.states(inputs)
        owners, places = np.nonzero(chosen_BL)
        yield PositionStates(batch[owners], places, states_BLD[torch.from_numpy(chosen_BL).to(device)])
        request.advance(len(batch))


def _behind_the_head(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an architecture does to its logits after the head, by its config."""
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def behind(logits: torch.Tensor) -> torch.Tensor:
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return behind
