"""Writes tests/golden/rows-v4: a cache of each task whose numbers are no logits of one class: several labels,
numbers, vectors, and images, which are read without a tokenizer. Run by `make golden`.

Three rows in two shards; what the teacher said are halves, which every machine has the same.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa

from storage.fingerprints import input_hash, row_id
from storage.records import LogitRows
from storage.seal import SealedParts, seal
from storage.spec import EmbeddingSpec, Identity, ImageSpec, Spec
from storage.writer import Store
from tests.storage.conftest import IDENTITY

GOLDEN = Path(__file__).parent / "rows-v4"
SHARDS = ([0, 1], [2])
SAID = np.array([[i, i + 0.5, -i] for i in range(3)], np.float32)
NAMES = ("bad", "fair", "good")
COMMON = IDENTITY.spec.model_dump(exclude={"task", "labels", "hidden"}) | {"hidden": None}
VECTORS = EmbeddingSpec(width=3, pool="mean", normalised=False)
IMAGES = ImageSpec(shape=(2, 2, 1), mean=(0.5,), std=(0.25,))
SPECS = {
    "labels": Spec(task="multi-label-classification", labels=NAMES, **COMMON),
    "values": Spec(task="regression", labels=NAMES, **COMMON),
    "vectors": Spec(task="sentence-embedding", labels=(), embedding=VECTORS, **COMMON),
    "images": Spec(task="image-classification", labels=NAMES, image=IMAGES, **COMMON),
}


def identity(name: str) -> Identity:
    """Who was asked."""
    changed = {"spec": SPECS[name], **({"tokenizer": None} if name == "images" else {})}
    return IDENTITY.model_copy(update=changed)


def rows(name: str, chosen: list[int]) -> LogitRows:
    """These rows, one target each."""
    lengths = [1 if name == "images" else i + 1 for i in chosen]
    return LogitRows(
        pa.array([row_id("golden", str(i)) for i in chosen]),
        pa.array([input_hash(np.arange(i + 1)) for i in chosen]),
        np.array(lengths, np.int32),
        SAID[chosen],
    )


def write(out: Path) -> None:
    """All golden caches, below `out`."""
    for name in SPECS:
        with tempfile.TemporaryDirectory() as place:
            store, who = Store(Path(place)), identity(name)
            shards = [store.put(who, rows(name, chosen), {}, 1.0) for chosen in SHARDS]
            files = {} if name == "images" else {"tokenizer.json": b"{}\n"}
            seal(out / name, SealedParts(who, shards, files, {"teacher": "golden"}))


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
