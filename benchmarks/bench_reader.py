"""Training batches from a cache, against common stream readers: targets/s, memory, time to the first batch.

A synthetic cache of a language model: rows of 100 to 300 tokens, 4 to 16 entries a token, plain layout, so
that `datasets` reads the same Parquet; webdataset and litdata hold the same records in their formats. Each
reader runs in a process of its own, cold (its files dropped from the page cache) and then warm, without help
and with two helpers (worker processes; reading threads of ours), and the better result counts. Peers are
installed without their dependencies into benchmarks/.peers. Then our reader over a cache of smaller shards,
and over 20 times as many of them: the growth of its memory.

Last line: JSON with our targets/s over those of the best peer (warm), the peers', and that growth.
"""

import json
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import common
import numpy as np
import pyarrow as pa

from storage.codecs import Threshold
from storage.entries import Entries, ends
from storage.fingerprints import row_id
from storage.records import EntryRows
from storage.seal import SealedParts, seal
from storage.spec import Identity
from storage.writer import Store
from tests.storage.conftest import IDENTITY

SHARDS, SHARD_ROWS, VOCAB = 24, 512, 49_152
TIMES = 20
SMALL_SHARDS, SMALL_ROWS = 48, 64  # of the memory measurement: three windows of shards
EPOCHS = 4  # the first is cold, the median of the others is warm
READERS = Path(__file__).with_name("readers.py")
PEERS = Path(__file__).with_name(".peers")
PINS = {
    "datasets": [],
    "webdataset": ["webdataset==1.0.2", "braceexpand==0.1.7"],
    "litdata": ["litdata==0.2.76", "lightning-utilities==0.15.3", "obstore==0.12.1", "tifffile==2026.3.3"],
}


def shard(number: int, num_rows: int) -> EntryRows:
    """Rows of random tokens, entries and weights; shards n and n + SHARDS differ only in their row ids."""
    random = np.random.default_rng(number % SHARDS)
    lengths = random.integers(100, 301, num_rows).astype(np.int32)
    counts = random.integers(4, 17, lengths.sum())
    offsets = ends(counts)
    weights = random.random(offsets[-1], np.float32) ** 3
    weights /= np.repeat(np.add.reduceat(weights, offsets[:-1]), counts)
    entries = Entries(
        offsets, random.integers(0, VOCAB, offsets[-1], np.int32), weights,
        (counts // 2).astype(np.int32), np.full(len(counts), -np.inf, np.float32),
    )  # fmt: skip
    names = pa.array([row_id("bench", f"{number}/{row}") for row in range(num_rows)])
    tokens = random.zipf(1.2, lengths.sum()).clip(max=VOCAB - 1).astype(np.int32)
    entropy = np.ones(num_rows, np.float32)
    return EntryRows(names, names, lengths, lengths, entries, tokens, entropy)


def make(root: Path, num_shards: int, num_rows: int = SHARD_ROWS) -> None:
    """Writes a cache of `num_shards` shards at root/cache."""
    body = {
        **IDENTITY.spec.model_dump(),
        "hidden": None,
        "task": "causal-lm",
        "labels": (),
        "vocab_size": VOCAB,
    }
    body["codec"] = Threshold(tau=0.07, seed=0, layout="plain")
    identity = Identity(**{**dict(IDENTITY), "spec": type(IDENTITY.spec).model_validate(body)})
    store = Store(root / "store")
    shards = [store.put(identity, shard(number, num_rows), {}, 1.0) for number in range(num_shards)]
    seal(root / "cache", SealedParts(identity, shards, {"tokenizer.json": b"{}\n"}, {}))
    shutil.rmtree(root / "store")


def python(peer: str) -> str:
    """An interpreter that has this peer in addition to all packages of this environment."""
    if not PINS.get(peer):
        return sys.executable
    place = PEERS / peer
    if not (place / "ready").is_file():
        venv.create(place, with_pip=True, clear=True)
        (packages,) = place.glob("lib/*/site-packages")
        (packages / "parent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        subprocess.run([place / "bin/pip", "install", "--quiet", "--no-deps", *PINS[peer]], check=True)
        (place / "ready").touch()
    return str(place / "bin/python")


def run(reader: str, root: Path, *arguments: object) -> dict[str, Any]:
    """The measurements that one reader prints."""
    command = [python(reader), str(READERS), reader, str(root), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make(root, SHARDS)
        for peer in ("webdataset", "litdata"):
            run(peer, root, "write")
        found: dict[str, dict[str, Any]] = {}
        for reader in ("ours", "datasets", "webdataset", "litdata"):
            for workers in (0, 2):
                one = run(reader, root, workers, EPOCHS, "cold")
                one["cold"] = one["targets"] / one["seconds"][0]
                one["warm"] = one["targets"] / statistics.median(one["seconds"][1:])
                found[f"{reader}, {workers}"] = one
                print(
                    f"{reader:11} {workers}  cold {one['cold']:12,.0f} targets/s  warm {one['warm']:12,.0f}"
                    f"  first batch {one['first']:6.2f} s  peak {one['peak'] / 2**20:7,.0f} MiB", flush=True,
                )  # fmt: skip
        assert len({(one["targets"], one["checksum"]) for one in found.values()}) == 1, "other records"
        peaks = []
        for times in (1, TIMES):
            shutil.rmtree(root / "cache")
            make(root, times * SMALL_SHARDS, SMALL_ROWS)
            peaks.append(run("ours", root, 1, 1)["peak"])
            print(f"ours, {times} times the data: peak {peaks[-1] / 2**20:,.0f} MiB", flush=True)
    best = {
        when: {
            reader: max(one[when] for name, one in found.items() if name.startswith(reader))
            for reader in ("ours", *PINS)
        }
        for when in ("warm", "cold")
    }
    ours = {when: rates.pop("ours") for when, rates in best.items()}
    common.print_result(
        {
            "ours_over_best_peer": ours["warm"] / max(best["warm"].values()),
            "ours_over_best_peer_cold": ours["cold"] / max(best["cold"].values()),
            "ours": ours["warm"],
            "peers": best["warm"],
            "peak_memory_growth_20x": peaks[1] / peaks[0],
        }
    )


if __name__ == "__main__":
    main()
