"""Teacher engines: rows in, cached targets out. What an engine takes, gives and can do."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.data.inputs import Inputs, Pixels, Reader, read_inputs
from pipeline.data.rows import Rows
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.engines.hidden_states import HiddenStateRecorder
from pipeline.engines.masking import Prompts, make_prompts
from storage.entries import ranges
from storage.records import EntryRows, LogitRows
from storage.spec import Spec

Indices = npt.NDArray[np.int64]
Advance = Callable[[int], None]


class EngineOutput(NamedTuple):
    """What is kept of some rows, in their order."""

    kept: LogitRows | EntryRows
    noise: npt.NDArray[np.float64] | None  # what a compact layout rounds with
    hidden: dict[str, npt.NDArray[np.float32]]  # name -> N x W, or a vector for each token, row after row


class EngineInputs(NamedTuple):
    """Rows that a teacher can be asked about."""

    teacher: Path
    spec: Spec
    prompts: Prompts | Pixels
    row_ids: pa.StringArray
    pad_id: int
    before_loading: Callable[[], None] = lambda: None

    @property
    def inputs(self) -> Inputs:
        """What it reads."""
        return self.prompts.tokens if isinstance(self.prompts, Prompts) else self.prompts

    @property
    def tokens(self) -> Tokens:
        """What it reads of text."""
        assert isinstance(self.prompts, Prompts)
        return self.prompts.tokens

    def read(self, part: Indices) -> npt.NDArray[np.int32]:
        """The token ids of these rows, end to end."""
        return self.tokens.ids[ranges(self.tokens.offsets[part], self.tokens.lengths[part])]

    def overheard(self, model: torch.nn.Module, part: Indices) -> HiddenStateRecorder | None:
        """What gathers the vectors of these rows that the spec wants; None where it wants none."""
        if self.spec.hidden is None:
            return None
        return HiddenStateRecorder(
            model, self.spec.hidden, self.tokens.lengths[part], part, self.row_ids.to_pylist()
        )


class TeacherEngine(Protocol):
    """A teacher that is loaded when it is first asked."""

    def load(self) -> None:
        """Load it now, if it is not."""

    def about(self, questions: EngineInputs) -> "TeacherEngine":
        """The same teacher, loaded once, asked about other rows."""

    def mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """The sum of its probabilities over about so many targets of the first rows: [classes or ids]."""

    def ask(self, part: Indices, advance: Advance = lambda rows: None) -> EngineOutput:
        """What is to be kept of these rows. `advance` is told how many are done."""


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
        asked = make_prompts(spec.task, spec.mask, found, rows.row_ids, reader.special)
        return EngineInputs(teacher, spec, asked, rows.row_ids, reader.pad_id, before_loading)
    assert isinstance(found, Pixels)
    return EngineInputs(teacher, spec, found, rows.row_ids, reader.pad_id, before_loading)
