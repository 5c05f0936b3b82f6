"""Writes tests/golden/states-v4: a cache with the states of every token in float16, and one in int8 with
principal components and with queries, keys and values. Run by `make golden`.

Two shards of two and one rows of different lengths; states are whole numbers and axes are ones, so every
machine has the same.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa

from storage import hidden
from storage.fingerprints import input_hash, row_id
from storage.hidden import Basis
from storage.records import LogitRows
from storage.seal import SealedParts, seal
from storage.spec import HiddenSpec, Identity
from storage.writer import Store
from tests.storage.conftest import IDENTITY

GOLDEN = Path(__file__).parent / "states-v4"
LENGTHS = (3, 1, 4)
SHARDS = (np.array([0, 1]), np.array([2]))
WIDTH = 4
AXES = np.array([[0, 0, 1, 0], [1, 0, 0, 0]], np.float32)
BASES = {"layer.1": Basis(np.array([1, 2, 3, 4], np.float32), AXES)}
PLAIN = HiddenSpec(layers=(0, 2), pool="none", width=WIDTH, dtype="float16")
SMALL = HiddenSpec(
    layers=(1,), pool="none", width=WIDTH, dtype="int8", qkv=(2,), pca=2, basis=hidden.fingerprint(BASES)
)


def identity(spec: HiddenSpec) -> Identity:
    """Who was asked."""
    return IDENTITY.model_copy(update={"spec": IDENTITY.spec.model_copy(update={"hidden": spec})})


def rows(chosen: np.ndarray) -> LogitRows:
    """These rows, one target each."""
    return LogitRows(
        pa.array([row_id("golden", str(i)) for i in chosen]),
        pa.array([input_hash(np.arange(LENGTHS[i])) for i in chosen]),
        np.array(LENGTHS, np.int32)[chosen],
        np.array([[i, 0.5, -i] for i in chosen], np.float32),
    )


def states(name: str, chosen: np.ndarray) -> np.ndarray:
    """[tokens of these rows, width] whole numbers; the first token of all is zero everywhere."""
    width = 3 * WIDTH if name.startswith("qkv.") else WIDTH
    numbers = np.arange(sum(LENGTHS))[:, None] * (3 + int(name[-1])) * np.arange(1, width + 1)[None] % 13
    owners = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    return numbers[np.isin(owners, chosen)].astype(np.float32)


def kept(spec: HiddenSpec, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """What is given to the store."""
    found = {name: states(name, chosen) for name in spec.names}
    return found | {name: BASES[name].components(found[name]) for name in spec.component_names}


def write(out: Path) -> None:
    """Both golden caches, below `out`."""
    for name, spec in (("plain", PLAIN), ("small", SMALL)):
        with tempfile.TemporaryDirectory() as place:
            store, who = Store(Path(place)), identity(spec)
            shards = [store.put(who, rows(part), kept(spec, part), 1.0) for part in SHARDS]
            basis = store.keep_basis(who, BASES) if spec.pca else None
            files = {"tokenizer.json": b"{}\n"}
            seal(out / name, SealedParts(who, shards, files, {"teacher": "golden"}, basis=basis))


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
