"""A teacher, asked about rows: one gives logits (or values, or a vector) of a row, or logits of each token;
language models give entries.

Both are loaded when they are first asked, so that a capture with nothing missing loads none.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline import draws, engine, language, teachers
from pipeline.data import Rows
from pipeline.inputs import Inputs, Pixels, Reader, read
from pipeline.prompts import Prompts, prompts
from pipeline.sparsify import Keys, rounding_noise, sparsify
from pipeline.states import Overheard, deaf
from pipeline.tokens import TextReader, Tokens
from storage.entries import ranges
from storage.records import EntryRows, LogitRows
from storage.spec import LANGUAGE, Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Indices = npt.NDArray[np.int64]
Advance = Callable[[int], None]


class Answer(NamedTuple):
    """What is kept of some rows, in their order."""

    kept: LogitRows | EntryRows
    noise: npt.NDArray[np.float64] | None  # what a compact layout rounds with
    hidden: dict[str, npt.NDArray[np.float32]]  # name -> N x W, or a vector for each token, row after row


class Questions(NamedTuple):
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

    def overheard(self, model: torch.nn.Module, part: Indices) -> Overheard | None:
        """What gathers the vectors of these rows that the spec wants; None where it wants none."""
        if self.spec.hidden is None:
            return None
        return Overheard(model, self.spec.hidden, self.tokens.lengths[part], part, self.row_ids.to_pylist())


class Asker(Protocol):
    """A teacher that is loaded when it is first asked."""

    def load(self) -> None:
        """Load it now, if it is not."""

    def about(self, questions: Questions) -> "Asker":
        """The same teacher, loaded once, asked about other rows."""

    def mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        """The sum of its probabilities over about so many targets of the first rows: [classes or ids]."""

    def ask(self, part: Indices, advance: Advance = lambda rows: None) -> Answer:
        """What is to be kept of these rows. `advance` is told how many are done."""


def questions(
    teacher: Path,
    spec: Spec,
    reader: Reader,
    rows: Rows,
    before_loading: Callable[[], None] = lambda: None,
) -> Questions:
    """Read rows as the teacher of this spec reads them. Raises DataError for rows that are too long."""
    found = read(reader, rows)
    if isinstance(found, Tokens) and isinstance(reader, TextReader):
        asked = prompts(spec.task, spec.mask, found, rows.row_ids, reader.special)
        return Questions(teacher, spec, asked, rows.row_ids, reader.pad_id, before_loading)
    assert isinstance(found, Pixels)
    return Questions(teacher, spec, found, rows.row_ids, reader.pad_id, before_loading)


def asker(about: Questions) -> Asker:
    """The one that fits the task."""
    return _Language(about) if about.spec.task in LANGUAGE else _Rows(about)


class _Rows:
    def __init__(self, questions: Questions) -> None:
        self._q = questions

    @cached_property
    def _model(self) -> "PreTrainedModel":
        self._q.before_loading()
        q, how = self._q, self._q.spec.image or self._q.spec.embedding
        model = teachers.load(q.teacher, task=q.spec.task, how=how, pad_token_id=q.pad_id)
        q.overheard(model, np.arange(0))  # what it has none of is refused now
        return model

    def load(self) -> None:
        _ = self._model

    def about(self, questions: Questions) -> "_Rows":
        other = _Rows(questions)
        other._model = self._model
        return other

    def mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        said = self._infer(np.arange(min(num_targets, len(self._q.row_ids))))
        found: npt.NDArray[np.float64] = (
            torch.softmax(torch.from_numpy(said.logits).double(), -1).sum(0).numpy()
        )
        return found

    def ask(self, part: Indices, advance: Advance = lambda rows: None) -> Answer:
        q, row_ids = self._q, self._q.row_ids.take(pa.array(part))
        inputs, lengths = q.inputs.hashes(part), q.inputs.lengths[part].astype(np.int32)
        if q.spec.per_position:
            names, heard = q.row_ids.to_pylist(), q.overheard(self._model, part)
            logits = engine.infer_tokens(
                self._model, q.tokens, part, q.pad_id, q.spec.precision, names, advance,
                heard.hear if heard else deaf,
            )  # fmt: skip
            kept_logits = LogitRows(row_ids, inputs, lengths, logits, q.read(part))
            return Answer(kept_logits, None, heard.found if heard else {})
        said = self._infer(part, advance)
        if q.spec.codec == "dense":
            return Answer(LogitRows(row_ids, inputs, lengths, said.logits), None, said.hidden)
        keys = Keys(draws.row_words(row_ids.to_pylist()), np.zeros(len(part), np.int64))
        entries = sparsify(torch.from_numpy(said.logits), q.spec.codec, keys)
        kept = EntryRows(row_ids, inputs, lengths, np.ones(len(part), np.int32), entries)
        return Answer(kept, rounding_noise(q.spec.codec, entries, keys), said.hidden)

    def _infer(self, part: Indices, advance: Advance = lambda rows: None) -> engine.TeacherOutput:
        q = self._q
        names = q.row_ids.to_pylist()
        return engine.infer(
            self._model, q.inputs, part, q.pad_id, q.spec.precision, q.spec.hidden, names, advance
        )


class _Language:
    def __init__(self, questions: Questions) -> None:
        assert isinstance(questions.prompts, Prompts)
        self._q, self._prompts = questions, questions.prompts

    @cached_property
    def _head(self) -> language.LanguageHead:
        self._q.before_loading()
        model = teachers.load_language(self._q.teacher, self._q.spec.precision, self._q.spec.task)
        self._q.overheard(model, np.arange(0))  # what it has none of is refused now
        head = language.LanguageHead(model, self._q.spec.num_outputs)
        shortest = np.array([self._q.tokens.lengths.argmin()])
        head.check(*(torch.from_numpy(array) for array in self._q.tokens.padded(shortest, self._q.pad_id)))
        return head

    def load(self) -> None:
        _ = self._head

    def about(self, questions: Questions) -> "_Language":
        other = _Language(questions)
        other._head = self._head
        return other

    def mass(self, num_targets: int) -> npt.NDArray[np.float64]:
        q = self._q
        share = 1.0 if q.spec.mask is None else q.spec.mask.share  # of tokens that have a target
        enough = int(np.searchsorted(q.tokens.offsets, num_targets / share)) + 1
        first = np.arange(min(enough, len(q.row_ids)))
        return language.mass(self._head, self._prompts, first, q.pad_id)

    def ask(self, part: Indices, advance: Advance = lambda rows: None) -> Answer:
        q, codec = self._q, self._q.spec.codec
        assert codec != "dense"  # the spec of a language model never is
        names, lengths = q.row_ids.to_pylist(), q.tokens.lengths[part]
        heard = q.overheard(self._head.model, part)
        hear = heard.hear if heard else deaf
        entries, entropy = language.infer(
            self._head, self._prompts, part, q.pad_id, codec, names, advance, hear
        )
        row_ids = q.row_ids.take(pa.array(part))
        words = np.repeat(draws.row_words(row_ids.to_pylist()), lengths, axis=0)
        keys = Keys(words, np.concatenate([np.arange(length) for length in lengths]))
        short = lengths.astype(np.int32)
        kept = EntryRows(row_ids, q.tokens.hashes(part), short, short, entries, q.read(part), entropy)
        return Answer(kept, rounding_noise(codec, entries, keys), heard.found if heard else {})
