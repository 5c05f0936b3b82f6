"""What a language model says about every position, without the matrix of its logits.

The model runs as it is, but its head is given one position only; the states that the head would have seen are
taken aside, and go through the head a chunk of positions at a time. So [batch, length, vocabulary] never
exists. What a model does to its logits behind the head (soft-caps, scales) is done to each chunk, and a first
small batch is compared with the model's own logits before anything else is computed.

Shape letters: B batch, L tokens, P positions, D width, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline import draws
from pipeline.engine import TOKENS_PER_BATCH, by_length, readable
from pipeline.prompts import Prompts
from pipeline.sparsify import Keys, NotFinite, sparsify
from storage.entries import Entries, concatenate, ends, ranges
from storage.errors import TeacherError
from storage.spec import SparseCodec

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

    @torch.inference_mode()
    def check(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> None:
        """Raise TeacherError where log-probabilities from chunks are not those of the model itself.

        This makes the matrix of logits: give it few positions.
        """
        device = next(self.model.parameters()).device
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
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


class Told(NamedTuple):
    """Positions of a batch, row after row: those that the model is asked about."""

    rows: npt.NDArray[np.int64]  # P, index into the rows that were asked about
    places: npt.NDArray[np.int64]  # P, place in its row
    states: torch.Tensor  # P x D


def read(
    head: LanguageHead,
    prompts: Prompts,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Iterator[Told]:
    """The states of the positions of these rows that are asked about, a batch of like lengths at a time.

    Rows never see each other: each is a sequence of its own, with positions from 0.
    """
    device, tokens = next(head.model.parameters()).device, prompts.tokens
    for batch in by_length(tokens.lengths[rows], TOKENS_PER_BATCH[device.type]):
        ids_BL, mask_BL = tokens.padded(rows[batch], pad_id)
        asked_BL = mask_BL.copy()
        asked_BL[mask_BL] = prompts.asked[ranges(tokens.offsets[rows[batch]], tokens.lengths[rows[batch]])]
        with readable(ids_BL):
            states_BLD = head.states(*(torch.from_numpy(a).to(device) for a in (ids_BL, mask_BL)))
        own, places = np.nonzero(asked_BL)
        yield Told(batch[own], places, states_BLD[torch.from_numpy(asked_BL).to(device)])
        advance(len(batch))


@torch.inference_mode()
def infer(
    head: LanguageHead,
    prompts: Prompts,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    codec: SparseCodec,
    names: Sequence[str],
    advance: Callable[[int], None] = lambda rows: None,
) -> Entries:
    """The entries of every token of these rows, row after row; those that are not asked about have none.

    `names` are the ids of all rows of `prompts`. `advance` is told how many rows are done. Raises
    TeacherError where logits are not finite: it names the row.
    """
    words = draws.row_words([names[row] for row in rows])
    lengths = prompts.tokens.lengths[rows]
    first, asked = ends(lengths), 0
    made: list[Entries] = []
    place = np.full(first[-1], -1)  # of each token among the positions asked about
    for told in read(head, prompts, rows, pad_id, advance):
        place[first[told.rows] + told.places] = asked + np.arange(len(told.rows))
        asked += len(told.rows)
        keys, start = Keys(words[told.rows], told.places), 0
        for logits_PV in head.logits(told.states):
            stop = start + len(logits_PV)
            try:
                made.append(sparsify(logits_PV, codec, keys.part(start, stop)))
            except NotFinite as error:
                row = names[rows[told.rows[start + error.position]]]
                raise TeacherError(
                    f"the teacher's logits for row {row}, token {told.places[start + error.position]}, are "
                    "not finite.\nFinished shards are kept. Look at that row; if the arithmetic overflows, "
                    "set precision: float32."
                ) from None
            start = stop
    nothing = Entries(
        np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32),
        np.zeros(1, np.int32), np.full(1, -np.inf, np.float32),
    )  # fmt: skip
    return concatenate([nothing, *made]).take(place + 1)


@torch.inference_mode()
def mass(
    head: LanguageHead, prompts: Prompts, rows: npt.NDArray[np.int64], pad_id: int
) -> npt.NDArray[np.float64]:
    """The probabilities of all positions of these rows that are asked about, summed: [V]."""
    total = np.zeros(head.vocab_size)
    for told in read(head, prompts, rows, pad_id):
        for logits_PV in head.logits(told.states):
            total += torch.softmax(logits_PV.float(), -1).double().sum(0).cpu().numpy()
    return total


@torch.inference_mode()
def mean_loss(
    head: LanguageHead,
    prompts: Prompts,
    truth: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int64],
    pad_id: int,
) -> float:
    """The mean loss over all positions of these rows that are asked about, in nats.

    `truth`: for each token of `prompts`, the id that is right at its position.
    """
    total, positions = 0.0, 0
    for told in read(head, prompts, rows, pad_id):
        right = truth[prompts.tokens.offsets[rows[told.rows]] + told.places].astype(np.int64)
        start = 0
        for logits_PV in head.logits(told.states):
            wanted = torch.from_numpy(right[start : start + len(logits_PV)]).to(logits_PV.device)
            loss = torch.nn.functional.cross_entropy(logits_PV.float(), wanted, reduction="sum")
            total, start = total + loss.item(), start + len(logits_PV)
        positions += len(right)
    return total / max(positions, 1)


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
