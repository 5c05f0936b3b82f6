"""Writes tests/golden/positions-v3: a cache of a classifier of tokens and one of a masked language model. Run
by `make golden`.

Two shards of two and one rows of different lengths; logits are whole numbers, so every machine has the same.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import sparsify
from pipeline.data.counter_rng import Keys, row_words
from pipeline.data.tokenizer import Tokens
from pipeline.engines.masking import teacher_tokens
from storage import compact
from storage.codecs import Threshold
from storage.entries import Entries, concatenate, ends, ranges
from storage.fingerprints import row_id, sha256_json
from storage.records import EntryRows, LogitRows
from storage.seal import SealedParts, seal
from storage.spec import Identity, Mask
from storage.writer import Store
from tests.storage.conftest import IDENTITY, LABELS

GOLDEN = Path(__file__).parent / "positions-v3"
VOCAB = 40
LENGTHS = (7, 4, 9)
SPECIAL = {"pad_token": 0, "unk_token": 1, "cls_token": 2, "sep_token": 3, "mask_token": 4}
MASK = Mask(share=0.4, seed=5)
RANKS = [11, 5, 7, 30]
CODEC = Threshold(tau=0.15, seed=3, layout="compact", ranks=sha256_json(RANKS))
IDS = pa.array([row_id("golden", str(i)) for i in range(len(LENGTHS))])
SHARDS = (np.array([0, 1]), np.array([2]))


def tokens() -> Tokens:
    """[CLS], ids from 5 upward, an unknown one in the last row, [SEP]."""
    rows = [[2, *(5 + (row * 13 + i * 7) % 35 for i in range(n - 2)), 3] for row, n in enumerate(LENGTHS)]
    rows[2][4] = SPECIAL["unk_token"]
    return Tokens(np.concatenate(rows).astype(np.int32), ends(LENGTHS), 0)


def logits(width: int) -> np.ndarray:
    """[tokens of all rows, width] whole numbers from -3 to 6."""
    numbers = np.arange(sum(LENGTHS))[:, None] * 31 + np.arange(width)[None] * 17
    return ((numbers**2) % 101 % 10 - 3).astype(np.float32)


def keys(rows: np.ndarray) -> Keys:
    """The names of all tokens of these rows."""
    lengths = np.array(LENGTHS)[rows]
    words = row_words(IDS.take(pa.array(rows)).to_pylist())
    return Keys(np.repeat(words, lengths, axis=0), ranges(np.zeros(len(rows), np.int64), lengths))


def entries(asked: np.ndarray) -> Entries:
    """What is kept at every token of all rows: nothing where it is not asked about."""
    at, known = np.flatnonzero(asked), keys(np.arange(len(LENGTHS)))
    made = sparsify(torch.from_numpy(logits(VOCAB)[at]), CODEC, Keys(known.rows[at], known.positions[at]))
    nothing = Entries(
        np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(1, np.int32),
        np.full(1, -np.inf, np.float32),
    )  # fmt: skip
    place = np.zeros(len(asked), np.int64)
    place[at] = 1 + np.arange(len(at))
    return concatenate([nothing, made]).take(place)


def entropy(logits_PV: np.ndarray) -> np.ndarray:
    """Of each position, in float64: the same on every machine when it is rounded to float32."""
    exps = np.exp(logits_PV)
    mass: np.ndarray = exps.sum(1)
    return np.log(mass) - (exps * logits_PV).sum(1) / mass


def identity(**spec: Any) -> Identity:
    """Who was asked."""
    tokenizer = IDENTITY.tokenizer.model_copy(update={"special_tokens": SPECIAL, "vocab_size": VOCAB})
    body = {**IDENTITY.spec.model_dump(), "hidden": None, **spec}
    return Identity(
        **{**dict(IDENTITY), "tokenizer": tokenizer, "spec": type(IDENTITY.spec).model_validate(body)}
    )


def write(out: Path) -> None:
    """Both golden caches, below `out`."""
    lengths, read = np.array(LENGTHS, np.int32), tokens()
    tags = LogitRows(IDS, read.hashes(), lengths, logits(len(LABELS)), read.ids)
    hidden = teacher_tokens("masked-lm", MASK, read, IDS, SPECIAL)
    kept = entries(hidden.has_target)
    entropies = np.where(hidden.has_target, entropy(logits(VOCAB).astype(np.float64)), 0)
    a_row = np.add.reduceat(entropies, ends(LENGTHS)[:-1]).astype(np.float32)
    masked = EntryRows(IDS, hidden.tokens.hashes(), lengths, lengths, kept, hidden.tokens.ids, a_row)
    who = identity(task="token-classification")
    language = identity(task="masked-lm", labels=(), vocab_size=VOCAB, codec=CODEC, mask=MASK)
    with tempfile.TemporaryDirectory() as place:
        store, files = Store(Path(place)), {"tokenizer.json": b"{}\n"}
        shards = [store.put(who, tags.take(rows), {}, 1.0) for rows in SHARDS]
        seal(out / "tags", SealedParts(who, shards, files, {"teacher": "golden"}))
        shards = []
        for rows in SHARDS:
            part = masked.take(rows)
            noise = rounding_noise(CODEC, part.entries, keys(rows))
            packed = CODEC.pack(part.entries, compact.Ranks(np.array(RANKS), VOCAB), noise)
            shards.append(store.put(language, part, {}, 1.0, packed))
        seal(out / "masked", SealedParts(language, shards, files, {"teacher": "golden"}, RANKS))


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
