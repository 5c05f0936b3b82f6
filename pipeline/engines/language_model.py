"""What a language model says about every position, without the matrix of its logits.

The model runs as it is, but its head is given one position only; the states that the head would have seen are
taken aside, and go through the head a chunk of positions at a time. So [batch, length, vocabulary] never
exists. What a model does to its logits behind the head (soft-caps, scales) is done to each chunk, and a first
small batch is compared with the model's own logits before anything else is computed.

Shape letters: B batch, L tokens, P positions, D width, V vocabulary.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import NotFinite, sparsify_and_measure
from pipeline.config.tasks import TASKS
from pipeline.data import counter_rng
from pipeline.data.counter_rng import Keys
from pipeline.engines.classifier import TOKENS_PER_BATCH, batches_by_length, explain_unreadable
from pipeline.engines.engine import Advance, EngineInputs, EngineOutput, Indices
from pipeline.engines.hidden_states import Record, no_recording
from pipeline.engines.loading import load_language_model
from pipeline.engines.masking import Prompts
from pipeline.objectives.base import binned_error
from pipeline.objectives.language_model import LanguageModelScores
from pipeline.streaming.model_inputs import InputTensors, for_transformers, input_tensors, on_device
from storage.codecs import SparseCodec
from storage.entries import Entries, concatenate, ends, ranges
from storage.errors import TeacherError
from storage.records import EntryRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def states(self, inputs: InputTensors) -> torch.Tensor:
        """What the head would read: [B, L, D]."""
        with self._taken_aside() as kept:
            self.model(**for_transformers(inputs))
        return kept[0]

    def next_logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The logits of what follows one row of ids [1, L]: [V]."""
        device = next(self.model.parameters()).device
        whole = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}
        states_BLD = self.states(on_device(whole, device))
        return next(self.logits(states_BLD[0, -1:]))[0]

    def logits(self, states_PD: torch.Tensor) -> Iterator[torch.Tensor]:
        """The logits of these states [<= chunk, V], in order; padding of the vocabulary is cut off."""
        width = 4 * self._head.weight.shape[0]
        chunk = max(1, CHUNK_BYTES.get(states_PD.device.type, CHUNK_BYTES["cpu"]) // width)
        for start in range(0, len(states_PD), chunk):
            yield self._behind(self._head(states_PD[start : start + chunk]))[:, : self.vocab_size]

    @torch.inference_mode()
    def check(self, inputs: InputTensors) -> None:
        """Raise TeacherError where log-probabilities from chunks are not those of the model itself.

        Of a few tokens of each row: this makes the matrix of their logits.
        """
        device = next(self.model.parameters()).device
        inputs = {name: whole[:, :CHECKED_TOKENS].to(device) for name, whole in inputs.items()}
        mask_BL = inputs["attention_mask"].bool()
        own = self.model(**for_transformers(inputs)).logits[mask_BL][:, : self.vocab_size]
        ours = torch.cat(list(self.logits(self.states(inputs)[mask_BL])))
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


class LanguageModelEngine:
    """Entries of every token's distribution over the vocabulary."""

    def __init__(self, questions: EngineInputs) -> None:
        assert isinstance(questions.prompts, Prompts)
        self._q, self._prompts = questions, questions.prompts

    @cached_property
    def _head(self) -> LanguageHead:
        self._q.before_loading()
        model = load_language_model(
            self._q.teacher, self._q.spec.precision, TASKS[self._q.spec.task].auto_class
        )
        self._q.overheard(model, np.arange(0))  # what it has none of is refused now
        head = LanguageHead(model, self._q.spec.num_outputs)
        shortest = np.array([self._q.tokens.lengths.argmin()])
        head.check(input_tensors(self._q.tokens.padded(shortest, self._q.pad_id)))
        return head

    def load(self) -> None:
        """Loads the model now."""
        _ = self._head

    def about(self, questions: EngineInputs) -> "LanguageModelEngine":
        """The same model over other rows."""
        other = LanguageModelEngine(questions)
        other._head = self._head
        return other

    def mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """See TeacherEngine."""
        q = self._q
        share = 1.0 if q.spec.mask is None else q.spec.mask.share  # of tokens that have a target
        enough = int(np.searchsorted(q.tokens.offsets, num_targets / share)) + 1
        first = np.arange(min(enough, len(q.row_ids)))
        return probability_mass(self._head, self._prompts, first, q.pad_id)

    def ask(self, part: Indices, advance: Advance = lambda rows: None) -> EngineOutput:
        """See TeacherEngine."""
        q, codec = self._q, self._q.spec.sparse
        assert codec is not None  # the spec of a language model never is
        names, lengths = q.row_ids.to_pylist(), q.tokens.lengths[part]
        heard = q.overheard(self._head.model, part)
        hear = heard.hear if heard else no_recording
        entries, entropy = infer_entries(
            self._head, self._prompts, part, q.pad_id, codec, names, advance, hear
        )
        row_ids = q.row_ids.take(pa.array(part))
        words = np.repeat(counter_rng.row_words(row_ids.to_pylist()), lengths, axis=0)
        keys = Keys(words, np.concatenate([np.arange(length) for length in lengths]))
        short = lengths.astype(np.int32)
        kept = EntryRows(row_ids, q.tokens.hashes(part), short, short, entries, q.read(part), entropy)
        return EngineOutput(kept, rounding_noise(codec, entries, keys), heard.found if heard else {})


CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # of logits at a time, as float32
CHECKED_TOKENS = 16  # of a row: enough to see what is done to logits
AGREE = 2e-2  # of log-probabilities in bfloat16; float32 is far below


class PositionStates(NamedTuple):
    """Positions of a batch, row after row: those that the model is asked about."""

    rows: npt.NDArray[np.int64]  # P, index into the rows that were asked about
    places: npt.NDArray[np.int64]  # P, place in its row
    states: torch.Tensor  # P x D


def position_states(
    head: LanguageHead,
    prompts: Prompts,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    advance: Callable[[int], None] = lambda rows: None,
    hear: Record = no_recording,
) -> Iterator[PositionStates]:
    """The states of the positions of these rows that are asked about, a batch of like lengths at a time.

    Rows never see each other: each is a sequence of its own, with positions from 0.
    """
    device, tokens = next(head.model.parameters()).device, prompts.tokens
    for batch in batches_by_length(tokens.lengths[rows], TOKENS_PER_BATCH[device.type]):
        arrays = tokens.padded(rows[batch], pad_id)
        mask_BL = arrays["attention_mask"]
        asked_BL = mask_BL.copy()
        asked_BL[mask_BL] = prompts.asked[ranges(tokens.offsets[rows[batch]], tokens.lengths[rows[batch]])]
        inputs = input_tensors(arrays, device)
        with explain_unreadable(inputs), hear(batch, inputs):
            states_BLD = head.states(inputs)
        own, places = np.nonzero(asked_BL)
        yield PositionStates(batch[own], places, states_BLD[torch.from_numpy(asked_BL).to(device)])
        advance(len(batch))


@torch.inference_mode()
def infer_entries(
    head: LanguageHead,
    prompts: Prompts,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    codec: SparseCodec,
    names: Sequence[str],
    advance: Callable[[int], None] = lambda rows: None,
    hear: Record = no_recording,
) -> tuple[Entries, npt.NDArray[np.float32]]:
    """(the entries of every token of these rows, row after row; the sum of the entropies of each row, nats).

    Tokens that are not asked about have none. `names` are the ids of all rows of `prompts`. `advance` is told
    how many rows are done; hidden states of all tokens go to `hear`. Raises TeacherError where logits are not
    finite: it names the row.
    """
    words = counter_rng.row_words([names[row] for row in rows])
    lengths = prompts.tokens.lengths[rows]
    first, asked = ends(lengths), 0
    made: list[Entries] = []
    entropies = np.zeros(len(rows))
    place = np.full(first[-1], -1)  # of each token among the positions asked about
    for told in position_states(head, prompts, rows, pad_id, advance, hear):
        place[first[told.rows] + told.places] = asked + np.arange(len(told.rows))
        asked += len(told.rows)
        keys, start = Keys(words[told.rows], told.places), 0
        for logits_PV in head.logits(told.states):
            stop = start + len(logits_PV)
            try:
                entries, entropy = sparsify_and_measure(logits_PV, codec, keys.part(start, stop))
            except NotFinite as error:
                row = names[rows[told.rows[start + error.position]]]
                raise TeacherError(
                    f"the teacher's logits for row {row}, token {told.places[start + error.position]}, are "
                    "not finite.\nFinished shards are kept. Look at that row; if the arithmetic overflows, "
                    "set precision: float32."
                ) from None
            made.append(entries)
            np.add.at(entropies, told.rows[start:stop], entropy)
            start = stop
    nothing = Entries(
        np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32),
        np.zeros(1, np.int32), np.full(1, -np.inf, np.float32),
    )  # fmt: skip
    return concatenate([nothing, *made]).take(place + 1), entropies.astype(np.float32)


@torch.inference_mode()
def probability_mass(
    head: LanguageHead, prompts: Prompts, rows: npt.NDArray[np.int64], pad_id: int
) -> npt.NDArray[np.float64]:
    """The probabilities of all positions of these rows that are asked about, summed: [V]."""
    total = np.zeros(head.vocab_size)
    for told in position_states(head, prompts, rows, pad_id):
        for logits_PV in head.logits(told.states):
            total += torch.softmax(logits_PV.float(), -1).double().sum(0).cpu().numpy()
    return total


@torch.inference_mode()
def score_language_model(
    head: LanguageHead,
    prompts: Prompts,
    truth: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int64],
    pad_id: int,
) -> LanguageModelScores:
    """How well it expects what is there, over all positions of these rows that are asked about.

    `truth`: for each token of `prompts`, the id that is right at its position.
    """
    total, looked = 0.0, 0.0
    sure: list[npt.NDArray[np.float32]] = []
    right: list[npt.NDArray[np.bool_]] = []
    started = time.perf_counter()
    for told in position_states(head, prompts, rows, pad_id):
        true = truth[prompts.tokens.offsets[rows[told.rows]] + told.places].astype(np.int64)
        start = 0
        for logits_PV in head.logits(told.states):
            wanted = torch.from_numpy(true[start : start + len(logits_PV)]).to(logits_PV.device)
            said = logits_PV.float().log_softmax(-1)
            best = said.max(-1)
            began = time.perf_counter()
            total -= said.gather(1, wanted[:, None]).sum().item()
            sure.append(best.values.exp().cpu().numpy())
            right.append((best.indices == wanted).cpu().numpy())
            start += len(logits_PV)
            looked += time.perf_counter() - began
    seconds = time.perf_counter() - started - looked
    confidence, correct = np.concatenate(sure), np.concatenate(right)
    error = binned_error(confidence, correct)
    return LanguageModelScores(
        total / len(correct), float(correct.mean()), error, None, None, len(correct) / seconds
    )


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
