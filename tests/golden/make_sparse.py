"""Writes tests/golden/sparse-v2: a small cache of each sparse codec and layout. Run by `make golden`.

Two shards of two rows of three positions each, over a vocabulary of 300; the logits are integers, so every
machine has the same.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import sparsify
from pipeline.data.counter_rng import Keys, row_words
from storage import compact
from storage.codecs import Sample, SparseCodec, Threshold, TopK
from storage.fingerprints import input_hash, row_id, sha256_json
from storage.records import EntryRows
from storage.seal import SealedParts, seal
from storage.spec import Identity
from storage.writer import Store
from tests.storage.conftest import IDENTITY

GOLDEN = Path(__file__).parent / "sparse-v2"
VOCAB, ROWS, POSITIONS = 300, 4, 3
RANKS = [int(i) for i in np.argsort(np.arange(VOCAB) * 7 % VOCAB, kind="stable")[:40]]


def codecs() -> dict[str, SparseCodec]:
    """Name of the directory -> codec."""
    table = sha256_json(RANKS)
    return {
        "topk-plain": TopK(k=5, layout="plain"),
        "topk-compact": TopK(k=5, layout="compact", ranks=table),
        "sample-plain": Sample(draws=11, seed=3, layout="plain"),
        "sample-compact": Sample(draws=11, seed=3, layout="compact", ranks=table),
        "threshold-plain": Threshold(tau=0.15, seed=3, layout="plain"),
        "threshold-compact": Threshold(tau=0.15, seed=3, layout="compact", ranks=table),
    }


def logits() -> torch.Tensor:
    """[ROWS * POSITIONS, VOCAB] whole numbers from -3 to 6."""
    numbers = np.arange(ROWS * POSITIONS)[:, None] * 31 + np.arange(VOCAB)[None] * 17
    return torch.from_numpy(((numbers**2) % 101 % 10 - 3).astype(np.float32))


def write(out: Path) -> None:
    """All golden caches, below `out`."""
    rows = [row_id("golden", str(i)) for i in range(ROWS)]
    places = np.tile(np.arange(POSITIONS), 2)
    for name, codec in codecs().items():
        spec = IDENTITY.spec.model_copy(
            update={"codec": codec, "hidden": None, "labels": tuple(f"w{i}" for i in range(VOCAB))}
        )
        who = Identity(**{**dict(IDENTITY), "spec": spec})
        ranks = compact.Ranks(np.array(RANKS), VOCAB)
        with tempfile.TemporaryDirectory() as store:
            shards = []
            for first in (0, 2):
                part = rows[first : first + 2]
                keys = Keys(np.repeat(row_words(part), POSITIONS, axis=0), places)
                said = logits()[first * POSITIONS : (first + 2) * POSITIONS]
                entries = sparsify(said, codec, keys)
                packed = None
                if codec.layout == "compact":
                    packed = codec.pack(entries, ranks, rounding_noise(codec, entries, keys))
                held = EntryRows(
                    pa.array(part), pa.array([input_hash([i]) for i in range(first, first + 2)]),
                    np.full(2, POSITIONS, np.int32), np.full(2, POSITIONS, np.int32), entries,
                )  # fmt: skip
                shards.append(Store(Path(store)).put(who, held, {}, 1.0, packed))
            table = RANKS if codec.layout == "compact" else None
            files = {"tokenizer.json": b"{}\n"}
            seal(out / name, SealedParts(who, shards, files, {"teacher": "golden"}, table))


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
