"""The inputs of models: token ids of texts, or pixels, through one interface.

Both are batched by `padded` into InputArrays: arrays by the names of model inputs in transformers. A new
input of text is a new array of `Tokens.padded`; only models that read it need to know it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config.students import StudentSection
from pipeline.data.rows import Rows
from pipeline.data.tokenizer import InputArrays, TextReader, Tokens
from storage.fingerprints import pixels_hash

PATCH = 256  # numbers of an image that cost about as much as a token: a patch of 16 x 16


class Pixels(NamedTuple):
    """N images, one byte a number: row after row of the image, channels last."""

    values: npt.NDArray[np.uint8]  # N x numbers of an image
    num_cut: int = 0  # images are never cut

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """1 for each image: it counts as one token."""
        return np.ones(len(self.values), np.int64)

    @property
    def costs(self) -> npt.NDArray[np.int64]:
        """The approximate cost of each in a batch, in tokens."""
        return np.full(len(self.values), -(-self.values.shape[1] // PATCH))

    def hashes(self, rows: npt.NDArray[np.int64] | None = None) -> pa.StringArray:
        """storage.fingerprints.pixels_hash of these rows, or of all."""
        chosen = self.values if rows is None else self.values[rows]
        return pa.array([pixels_hash(image.tobytes()) for image in chosen], pa.string())

    def padded(self, rows: npt.NDArray[np.int64], pad_id: int) -> InputArrays:
        """`pixel_values` [B, numbers of an image] of these rows, uint8; they need no padding."""
        return {"pixel_values": self.values[rows]}


Inputs = Tokens | Pixels


class PixelReader(NamedTuple):
    """Reads prepared images, as a TextReader reads texts."""

    num_ids: int  # numbers of an image: the inputs of a model
    max_length: int = 1
    pad_id: int = 0

    def identity(self) -> None:
        """Images are read without a tokenizer."""


Reader = TextReader | PixelReader


def read_inputs(reader: Reader, rows: Rows, words: bool = False) -> Inputs:
    """The inputs of these rows; with `words` also the word of each token of a text.

    Raises DataError for rows that are too long.
    """
    if isinstance(reader, TextReader):
        return reader.read(rows.texts.to_pylist(), rows.row_ids, words)
    assert rows.pixels is not None  # caches of images are made of rows of images
    return Pixels(rows.pixels)


def student_reader(student: StudentSection, rows: Rows, tokenizer: Path) -> Reader:
    """The reader of this student; it cuts longer rows."""
    if student.text is None:
        return PixelReader(int(np.prod(rows.shape)))
    return TextReader(tokenizer, student.text.max_length, "truncate")
