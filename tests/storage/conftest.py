"""A small sealed cache of two shards with hidden states, for the tests of this room."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage import Cache, records
from storage.fingerprints import input_hash, row_id
from storage.seal import SealedParts, seal
from storage.spec import HiddenSpec, Identity, Spec, TeacherIdentity, TokenizerIdentity
from storage.writer import Store, StoredShard

LABELS = ("bad", "fair", "good")
HIDDEN = HiddenSpec(layers=(1, 2), pool="mean", width=4, dtype="float16")
IDENTITY = Identity(
    capture_version=1,
    teacher=TeacherIdentity(weights="1" * 64, config="2" * 64),
    tokenizer=TokenizerIdentity(
        content="3" * 64, vocab_size=100, special_tokens={"pad_token": 0}, padding_side="right"
    ),
    spec=Spec(
        task="sequence-classification",
        labels=LABELS,
        codec="dense",
        max_length=16,
        too_long="error",
        precision="float32",
        hidden=HIDDEN,
    ),
)


def make_rows(first: int, num: int) -> records.LogitRows:
    """Rows first to first + num of a made-up dataset; row i has logits (i, i + 1/2, -i)."""
    numbers = range(first, first + num)
    return records.LogitRows(
        pa.array([row_id("toy", f"text {i}") for i in numbers]),
        pa.array([input_hash([i, i + 1]) for i in numbers]),
        np.full(num, 2, np.int32),
        np.array([[i, i + 0.5, -i] for i in numbers], np.float32),
    )


def make_states(rows: records.LogitRows) -> dict[str, np.ndarray]:
    """Pooled states for these rows: multiples of the first logit."""
    return {f"layer.{n}": rows.logits[:, :1] * np.full((1, 4), n, np.float32) for n in HIDDEN.layers}


def fill(store: Store, sizes: tuple[int, ...] = (5, 3)) -> list[StoredShard]:
    """Finished shards of these sizes over consecutive rows."""
    shards, first = [], 0
    for size in sizes:
        rows = make_rows(first, size)
        shards.append(store.put(IDENTITY, rows, make_states(rows), 1.0))
        first += size
    return shards


def make_cache(root: Path) -> Cache:
    """A sealed cache of two shards, 8 rows, in root/caches/toy."""
    shards = fill(Store(root / "store"))
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    seal(root / "caches" / "toy", SealedParts(IDENTITY, shards, files, {"teacher": "toy"}))
    return Cache.open(root / "caches" / "toy")


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sealed cache that no test may change."""
    return make_cache(tmp_path_factory.mktemp("sealed")).path


@pytest.fixture
def cache(sealed: Path, tmp_path: Path) -> Cache:
    """A copy of the sealed cache that the test may damage."""
    shutil.copytree(sealed, tmp_path / "toy")
    return Cache.open(tmp_path / "toy")
