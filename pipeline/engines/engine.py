"""Teacher engines: rows in, cached targets out. What an engine takes, what it gives, and what it can do."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.data.inputs import Inputs, Pixels, Reader, read_inputs
from pipeline.data.rows import Rows
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.engines.hidden_states import HiddenStateRecorder
from pipeline.engines.inference import Advance, Indices, InferenceRequest
from pipeline.engines.masking import TeacherTokens, teacher_tokens
from storage.entries import ranges
from storage.errors import TeacherError
from storage.records import EntryRows, LogitRows
from storage.spec import Spec


class Capabilities(NamedTuple):
    """What the engines of a class can give of a teacher: known before a teacher is loaded."""

    full_logits: bool  # of every class or id; without them, the `top_k` largest log-probabilities
    hidden_states: bool  # and the queries, keys and values of attention
    top_k: int | None = None  # log-probabilities a target, where there are no full logits


class EngineInputs(NamedTuple):
    """N rows as a teacher reads them, and what is to be kept of its outputs."""

    teacher: Path  # the teacher's directory
    spec: Spec
    read: TeacherTokens | Pixels
    row_ids: pa.StringArray  # N
    pad_id: int
    before_loading: Callable[[], None] = lambda: None  # called before the model is loaded; may refuse it

    @property
    def inputs(self) -> Inputs:
        """The token ids (masked where the spec has a mask) or the pixels."""
        return self.read.tokens if isinstance(self.read, TeacherTokens) else self.read

    @property
    def tokens(self) -> Tokens:
        """The token ids of rows of text."""
        assert isinstance(self.read, TeacherTokens)
        return self.read.tokens

    def token_ids(self, part: Indices) -> npt.NDArray[np.int32]:
        """The token ids of these rows, end to end."""
        return self.tokens.ids[ranges(self.tokens.offsets[part], self.tokens.lengths[part])]

    def request(self, part: Indices, advance: Advance = lambda rows: None) -> InferenceRequest:
        """A request to run a model on these rows."""
        row_ids = self.row_ids.to_pylist()
        return InferenceRequest(self.inputs, part, self.pad_id, self.spec.precision, row_ids, advance)

    def first_rows(self, num_tokens: float) -> Indices:
        """The first rows: as many as hold `num_tokens` tokens, or all."""
        enough = int(np.searchsorted(self.tokens.offsets, num_tokens)) + 1
        return np.arange(min(enough, len(self.row_ids)))

    def recorder(self, model: torch.nn.Module, part: Indices) -> HiddenStateRecorder | None:
        """Records the hidden states of these rows that the spec names; None where it names none.

        Raises TeacherError where the model does not have them.
        """
        if self.spec.hidden is None:
            return None
        return HiddenStateRecorder(
            model, self.spec.hidden, self.tokens.lengths[part], part, self.row_ids.to_pylist()
        )


class EngineOutput(NamedTuple):
    """What is kept of some rows, in their order."""

    kept: LogitRows | EntryRows
    noise: npt.NDArray[np.float64] | None  # one a sparse entry: the random numbers of a compact layout
    hidden: dict[str, npt.NDArray[np.float32]]  # name -> N x W, or a vector a token, row after row


class TeacherEngine(Protocol):
    """Runs one teacher over one set of rows. The model is loaded when it is first needed."""

    capabilities: ClassVar[Capabilities]

    def __init__(self, inputs: EngineInputs) -> None:
        """Loads nothing."""

    def load(self) -> None:
        """Load the model now, if it is not loaded yet."""

    def for_rows(self, inputs: EngineInputs) -> "TeacherEngine":
        """The same teacher, loaded once, for other rows."""

    def probability_mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """The probabilities of about `num_targets` targets of the first rows, summed: [classes or ids].

        A compact layout ranks its ids by it. An engine without full logits sums those that it has.
        """

    def answer(self, part: Indices, advance: Advance = lambda rows: None) -> EngineOutput:
        """The targets of these rows, as the spec keeps them. `advance` is called with the rows done."""


def engine_inputs(
    teacher: Path,
    spec: Spec,
    reader: Reader,
    rows: Rows,
    before_loading: Callable[[], None] = lambda: None,
) -> EngineInputs:
    """Read rows as the teacher of this spec reads them. Raises DataError for rows that are too long."""
    found = read_inputs(reader, rows)
    if isinstance(found, Tokens) and isinstance(reader, TextReader):
        masked = teacher_tokens(spec.task, spec.mask, found, rows.row_ids, reader.special)
        return EngineInputs(teacher, spec, masked, rows.row_ids, reader.pad_id, before_loading)
    assert isinstance(found, Pixels)
    return EngineInputs(teacher, spec, found, rows.row_ids, reader.pad_id, before_loading)


def check_capabilities(kind: str, capabilities: Capabilities, spec: Spec) -> None:
    """Raise TeacherError where a cache of this spec needs more than an engine of this kind can give."""
    lacking, most, codec = [], capabilities.top_k or 0, spec.sparse
    needed = codec.num_largest if codec else None
    if not capabilities.full_logits and (needed is None or needed > most):
        found = "dense" if codec is None else codec.name if needed is None else f"topk with k {needed}"
        lacking.append(f"  targets  found {found}, expected topk with k up to {most}")
    if spec.hidden is not None and not capabilities.hidden_states:
        lacking.append(f"  hidden   found {', '.join(spec.hidden.names)}, expected none")
    if lacking:
        faults = "\n".join(lacking)
        raise TeacherError(
            f"the cache needs more than the engine {kind!r} can give of a teacher.\n{faults}\n"
            "Change targets and hidden of the entry in caches, or take a teacher that another engine runs."
        )
