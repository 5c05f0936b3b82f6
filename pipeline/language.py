"""What a language model says about every position, without the matrix of its logits.

The model runs as it is, but its head is given one position only; the states that the head would have seen are
taken aside, and go through the head a chunk of positions at a time. So [batch, length, vocabulary] never
exists. What a model does to its logits behind the head (soft-caps, scales) is done to each chunk, and a first
small batch is compared with the model's own logits before anything else is computed.

Shape letters: B batch, L tokens, P positions, D width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from storage.errors import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # of logits at a time, as float32
AGREE = 2e-2  # of log-probabilities in bfloat16; float32 is far below


class LanguageHead:
    """A language model's states, and its logits from them a chunk at a time."""

    def __init__(self, model: "PreTrainedModel", vocab_size: int) -> None:
        head = model.get_output_embeddings()
        if head is None:
            raise TeacherError(
                f"{type(model).__name__} has no output embeddings: it is no language model.\n"
                "Take a model with a vocabulary head (AutoModelForCausalLM, AutoModelForMaskedLM)."
            )
        self.model, self.vocab_size = model, vocab_size
        self._head = head
        self._behind = _behind_the_head(model.config)

    def states(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """What the head would read: [B, L, D]."""
        with self._taken_aside() as kept:
            self.model(input_ids=ids_BL, attention_mask=mask_BL.long())
        return kept[0]

    def logits(self, states_PD: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits of these states [<= chunk, V], in order; padding of the vocabulary is cut off."""
        width = 4 * self._head.weight.shape[0]
        chunk = max(1, CHUNK_BYTES.get(states_PD.device.type, CHUNK_BYTES["cpu"]) // width)
        for start in range(0, len(states_PD), chunk):
            yield self._behind(self._head(states_PD[start : start + chunk]))[:, : self.vocab_size]

    def check(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> None:
        """Raise TeacherError where log-probabilities from chunks are not those of the model itself."""
        mask = mask_BL.bool()
        own = self.model(input_ids=ids_BL, attention_mask=mask_BL.long()).logits[mask][:, : self.vocab_size]
        ours = torch.cat(list(self.logits(self.states(ids_BL, mask_BL)[mask])))
        apart = (own.float().log_softmax(-1) - ours.float().log_softmax(-1)).abs().max().item()
        if not apart <= AGREE * max(1.0, own.abs().max().item()):
            raise TeacherError(
                f"{type(self.model).__name__} does something to its logits that is not known here: "
                f"log-probabilities are {apart:.3g} apart.\n"
                "Known are final_logit_softcapping, logit_scale and logits_scaling of its config."
            )

    @contextlib.contextmanager
    def _taken_aside(self) -> Iterator[list[torch.Tensor]]:
        kept: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            kept.append(args[0])
            return (args[0][:, :1],)

        handle = self._head.register_forward_pre_hook(keep)
        try:
            yield kept
        finally:
            handle.remove()


def _behind_the_head(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the architecture does to logits after its head."""
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def behind(logits: torch.Tensor) -> torch.Tensor:
        if scale != 1.0:
            logits = logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return behind
