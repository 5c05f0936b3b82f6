"""Text -> token ids, for teachers and students.

Uses the `tokenizers` library alone (tokenizer.json): reading text needs no transformers.
"""

import json
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from unicodedata import category

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.runtime.files import write_json
from storage.errors import AssetError, DataError
from storage.fingerprints import input_hash, sha256_json
from storage.spec import TokenizerIdentity

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SPECIAL = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
BATCH_TEXTS = 4096
NO_WORD = -1  # of tokens that the tokenizer adds

# The inputs of a model for B rows: arrays by their names in transformers, each with B first.
InputArrays = dict[str, npt.NDArray[Any]]


class Tokens(NamedTuple):
    """Concatenated token ids of N rows; row i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]  # N + 1
    num_cut: int  # rows cut to the maximum length
    words: npt.NDArray[np.int32] | None = None  # of each token, if read: its word in the row, or NO_WORD

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @property
    def costs(self) -> npt.NDArray[np.int64]:
        """The cost of each row in a batch, in tokens."""
        return self.lengths

    def row(self, index: int) -> npt.NDArray[np.int32]:
        """The token ids of one row."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def hashes(self, rows: npt.NDArray[np.int64] | None = None) -> pa.StringArray:
        """storage.fingerprints.input_hash of these rows, or of all."""
        chosen = range(len(self.offsets) - 1) if rows is None else rows
        return pa.array([input_hash(self.row(i)) for i in chosen], pa.string())

    def padded(self, rows: npt.NDArray[np.int64], pad_id: int) -> InputArrays:
        """`input_ids` [B, L] of these rows, int64, padded on the right to the longest, and `attention_mask`
        [B, L], bool, true for tokens.
        """
        lengths_B = self.offsets[rows + 1] - self.offsets[rows]
        mask_BL = np.arange(lengths_B.max()) < lengths_B[:, None]
        ids_BL = np.full(mask_BL.shape, pad_id, np.int64)
        ids_BL[mask_BL] = self.ids[(self.offsets[rows][:, None] + np.arange(mask_BL.shape[1]))[mask_BL]]
        return {"input_ids": ids_BL, "attention_mask": mask_BL}


class TextReader:
    """A tokenizer with its padding id, a maximum length, and what happens to longer rows."""

    def __init__(self, directory: Path, max_length: int, too_long: str) -> None:
        path, config = (directory / name for name in TOKENIZER_FILES)
        if not path.is_file():
            raise AssetError(
                f"{directory} has no tokenizer.json.\nSave a fast tokenizer there: "
                f"AutoTokenizer.from_pretrained(...).save_pretrained({str(directory)!r})."
            )
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.max_length, self.too_long = max_length, too_long
        self._settings = json.loads(config.read_text()) if config.is_file() else {}
        self.special = {name: i for name in SPECIAL if (i := self._special_id(name)) is not None}
        # Padding is masked, so any id would do; decoders without a padding token use that of the end of text.
        self.pad_id = self.special.get("pad_token", self.special.get("eos_token", 0))

    @property
    def num_ids(self) -> int:
        """One more than the largest id: the entries that an embedding needs. Vocabularies can have holes."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def identity(self) -> TokenizerIdentity:
        """The identity of this tokenizer: its file's content, size, special tokens and padding side."""
        return TokenizerIdentity(
            content=sha256_json(json.loads(self.tokenizer.to_str())),
            vocab_size=self.tokenizer.get_vocab_size(with_added_tokens=True),
            special_tokens=self.special,
            padding_side=self._settings.get("padding_side", "right"),
        )

    def read(
        self, texts: Iterable[str], row_ids: Sequence[str] | pa.StringArray, words: bool = False
    ) -> Tokens:
        """The token ids of `texts`. Raises DataError for rows past the maximum with `too_long` error.

        With `words`: also the word of each token; single spaces separate words.
        """
        ids: list[npt.NDArray[np.int32]] = []
        numbers: list[npt.NDArray[np.int32]] = []
        full: list[int] = []
        encode = self.tokenizer.encode_batch if words else self.tokenizer.encode_batch_fast  # without offsets
        for batch in _batched(texts):
            for text, encoding in zip(batch, encode(batch), strict=True):
                full.append(len(encoding.ids))
                ids.append(_cut(encoding.ids, encoding, self.max_length, self.pad_id))
                if words:
                    own = _word_numbers(text, encoding)
                    numbers.append(_cut(own, encoding, self.max_length, NO_WORD))
        lengths = np.array(full)
        over = np.flatnonzero(lengths > self.max_length)
        if len(over) and self.too_long == "error":
            worst = int(lengths.argmax())
            raise DataError(
                f"{len(over):,} of {len(full):,} rows are longer than max_length {self.max_length} tokens "
                f"(the longest has {lengths[worst]}: row {row_ids[worst]}).\n"
                "Raise max_length, or write too_long: truncate to cut them (they are counted)."
            )
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int64)
        ids, numbers = ids or [np.zeros(0, np.int32)], numbers or [np.zeros(0, np.int32)]
        return Tokens(np.concatenate(ids), offsets, len(over), np.concatenate(numbers) if words else None)

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int, directory: Path, max_length: int) -> Self:
        """A WordPiece tokenizer of `vocab_size` entries learned from `texts`, saved into `directory`.

        The same texts give the same bytes.
        """
        texts = list(texts)
        normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        # The trainer numbers letters inside words in the order of a hash table, a different one in each run,
        # and breaks ties by these numbers. As special tokens they have fixed numbers.
        inner = sorted({c for text in texts for w in normalizer.normalize_str(text).split() for c in w[1:]})
        letters = [f"##{c}" for c in inner if c not in string.punctuation and category(c)[0] != "P"]
        draft = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        draft.normalizer, draft.pre_tokenizer = normalizer, splitter
        draft.train_from_iterator(
            texts,
            trainers.WordPieceTrainer(
                vocab_size=vocab_size, special_tokens=[*special, *letters], show_progress=False
            ),
        )
        tokenizer = Tokenizer(models.WordPiece(draft.get_vocab(), unk_token="[UNK]"))
        tokenizer.add_special_tokens(special)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(directory / TOKENIZER_FILES[0]))
        names = dict(zip(SPECIAL, special, strict=False))
        write_json({**names, "padding_side": "right"}, directory / TOKENIZER_FILES[1])
        return cls(directory, max_length, "truncate")

    def _special_id(self, name: str) -> int | None:
        token = self._settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(text) if text else None


def _cut(values: list[int], encoding: Encoding, max_length: int, nothing: int) -> npt.NDArray[np.int32]:
    """The values of a row's tokens, at most `max_length`; `nothing` for an empty row.

    Special tokens at its end stay, as when a tokenizer truncates.
    """
    if len(values) <= max_length:
        return np.array(values or [nothing], np.int32)
    closing = 0
    while closing < max_length and encoding.special_tokens_mask[-1 - closing]:
        closing += 1
    return np.array(values[: max_length - closing] + values[len(values) - closing :], np.int32)


def _word_numbers(text: str, encoding: Encoding) -> list[int]:
    """The word of each token, by its start. A token that starts with a space is of the word after it."""
    spaces = np.cumsum(np.frombuffer(f"{text}.".encode("utf-32-le"), "<u4") == ord(" "))
    return [
        NO_WORD if special else int(spaces[start])
        for (start, _), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    ]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch
