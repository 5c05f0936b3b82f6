"""A cache of 1,000,000 shards: seconds and memory to open, plan and order it. docs/scale.md explains them.

The shards are simulated: their files do not exist, but their table does, as a reader finds it, and so do the
row ids and input hashes that a plan reads (two rows a shard; the cost of more rows is printed too). Each
step runs in a process of its own; its imports count in memory and not in seconds. The cost without a table,
and of a plan that opens finished shards, is measured at 1/100 of the size.

`--shards N`: another number. Last line: JSON with the seconds and the peak memory (bytes) of each step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import pyarrow as pa

from pipeline.capture.shard_keys import cut_into_shards, unfinished_shards
from storage import Cache, manifest, order
from storage.checksums import file_entry
from storage.codecs import Threshold
from storage.manifest import Manifest
from storage.shard_table import Columns, ShardTable, file_names
from storage.spec import Identity, Spec, TeacherIdentity, TokenizerIdentity

SHARDS, ROWS_A_SHARD, PER_WINDOW = 1_000_000, 2, 16
LIMIT_SECONDS, LIMIT_BYTES = 2.0, 500e6
LARGER = 100  # the factor between the full size and that of the comparison

IDENTITY = Identity(
    capture_version=1,
    teacher=TeacherIdentity(weights="1" * 64, config="2" * 64),
    tokenizer=TokenizerIdentity(content="3" * 64, vocab_size=49_152, special_tokens={}, padding_side="right"),
    spec=Spec(
        task="causal-lm",
        labels=(),
        vocab_size=49_152,
        codec=Threshold(layout="plain", tau=0.07, seed=0),
        max_length=2048,
        too_long="error",
        precision="bfloat16",
        hidden=None,
    ),
)


def table(num: int) -> ShardTable:
    """Shards of about 10^6 positions and 20 MB, with random digests."""
    draw = np.random.default_rng(0)
    files = len(file_names(IDENTITY.spec))
    return ShardTable(
        IDENTITY.spec,
        Columns(
            draw.integers(0, 256, (num, 32), np.uint8),
            np.full(num, 1000, np.int64),
            draw.integers(900_000, 1_100_000, num),
            draw.integers(0, 256, (num, 32), np.uint8),
            draw.integers(18 * 2**20, 22 * 2**20, (files, num)),
            draw.integers(0, 256, (files, num, 32), np.uint8),
        ),
    )


def write(root: Path, num: int) -> None:
    """Writes the manifest and the table of a cache of `num` shards, and none of its shards."""
    root.mkdir()
    table(num).write(root / manifest.TABLE_NAME)
    entry = file_entry(root, manifest.TABLE_NAME)
    sealed = Manifest(
        format_version=5, identity=IDENTITY, dataset="4" * 64, shards=(), tokenizer_files=(), provenance={},
        shard_table=entry,
    )  # fmt: skip
    (root / manifest.MANIFEST_NAME).write_bytes(manifest.render(sealed))


def write_list(root: Path, num: int) -> None:
    """Writes the same shards as a list in the manifest."""
    root.mkdir()
    sealed = Manifest(
        format_version=3, identity=IDENTITY, dataset="4" * 64, shards=tuple(table(num)), tokenizer_files=(),
        provenance={},
    )  # fmt: skip
    (root / manifest.MANIFEST_NAME).write_bytes(manifest.render(sealed))


def hexadecimal(num: int, seed: int) -> pa.StringArray:
    """`num` names of 32 random hex characters."""
    draw, digits = np.random.default_rng(seed), np.frombuffer(b"0123456789abcdef", np.uint8)
    characters = np.empty((num, 32), np.uint8)
    for first in range(0, num, 2**16):
        part = characters[first : first + 2**16]
        part[:] = digits[draw.integers(0, 16, part.shape, np.uint8)]
    ends = np.arange(0, 32 * num + 1, 32, np.int32)
    return pa.StringArray.from_buffers(num, pa.py_buffer(ends), pa.py_buffer(characters))


def opening(root: Path, num: int) -> Callable[[], object]:
    def step() -> None:
        cache = Cache.open(root / "many")
        assert len(cache.shards) == num
        assert cache.num_rows == 1000 * num
        assert cache.shards[num // 2].rows == 1000

    return step


def planning_done(root: Path, num: int) -> Callable[[], object]:
    """All but every tenth shard is finished; the step finds the others."""
    ids, inputs = hexadecimal(num * ROWS_A_SHARD, 1), hexadecimal(num * ROWS_A_SHARD, 2)
    finished = np.fromfile(root / "finished", np.uint8).reshape(-1, 32)

    def step() -> None:
        cut = cut_into_shards(IDENTITY, ids, inputs, ROWS_A_SHARD)
        left = unfinished_shards(cut, finished)
        assert left is not None
        assert len(left) == len(range(0, num, 10))

    return step


def ordering(root: Path, num: int) -> Callable[[], object]:
    return lambda: [order.windows(num, PER_WINDOW, seed, 0) for seed in range(1)]


def opening_a_list(root: Path, num: int) -> Callable[[], object]:
    return lambda: manifest.load(root / "listed")


def nothing(root: Path, num: int) -> Callable[[], object]:
    """Measures the imports alone."""
    return lambda: None


STEPS = {
    "open": opening, "plan": planning_done, "order": ordering, "imports": nothing,
    "open_listed": opening_a_list,
}  # fmt: skip


def run_step(step: str, root: Path, num: int) -> dict[str, float]:
    """Seconds, processor seconds and peak memory of a step, in processes of its own: the median of three."""
    measured = []
    for _ in range(3):
        command = [sys.executable, __file__, "--step", step, "--root", str(root), "--shards", str(num)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    seconds, processor, peak = sorted(measured)[1]
    return {"seconds": round(seconds, 3), "processor_seconds": round(processor, 3), "peak_bytes": peak}


def measure_step(step: str, root: Path, num: int) -> None:
    run = STEPS[step](root, num)
    started, spent = time.perf_counter(), time.process_time()
    run()
    seconds, processor = time.perf_counter() - started, time.process_time() - spent
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent process too
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    print(json.dumps([seconds, processor, 1024 * peak]))


def hashing() -> float:
    """Seconds to name the shards of 10^6 rows at 1,000 rows a shard: the cost of more rows in a plan."""
    ids, inputs = hexadecimal(10**6, 1), hexadecimal(10**6, 2)
    return common.medians({"cut": lambda: cut_into_shards(IDENTITY, ids, inputs, 1000)}, rounds=3)["cut"]


def opening_a_shard() -> float:
    """Seconds to read the row ids of one finished shard, as a plan does for shards of another cut."""
    from storage.writer import Store
    from tests.storage.conftest import IDENTITY as TOY
    from tests.storage.conftest import make_rows, make_states

    rows = make_rows(0, 1000)
    with tempfile.TemporaryDirectory() as directory:
        shard = Store(Path(directory)).put(TOY, rows, make_states(rows), 1.0)
        return common.medians({"read": lambda: shard.row_ids().to_pylist()}, rounds=20)["read"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--root", type=Path)
    options = parser.parse_args()
    if options.step:
        measure_step(options.step, options.root, options.shards)
        return
    num, few = options.shards, max(1, options.shards // LARGER)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write(root / "many", num)
        write_list(root / "listed", few)
        ids, inputs = hexadecimal(num * ROWS_A_SHARD, 1), hexadecimal(num * ROWS_A_SHARD, 2)
        keys = cut_into_shards(IDENTITY, ids, inputs, ROWS_A_SHARD).keys
        np.delete(keys, np.s_[::10], axis=0).tofile(root / "finished")
        del ids, inputs, keys
        table_bytes = (root / "many" / manifest.TABLE_NAME).stat().st_size
        list_bytes = LARGER * (root / "listed" / manifest.MANIFEST_NAME).stat().st_size
        found = {step: run_step(step, root, num) for step in ("imports", "open", "plan", "order")}
        listed = run_step("open_listed", root, few)
    for name, one in found.items():
        print(
            f"{name:8} {one['seconds']:7.3f} s, {one['processor_seconds']:7.3f} s of the processor, "
            f"{one['peak_bytes'] / 1e6:4.0f} MB at the peak"
        )
    grown = listed["peak_bytes"] - found["imports"]["peak_bytes"]
    before = {
        "open_seconds": LARGER * listed["seconds"],
        "open_bytes": found["imports"]["peak_bytes"] + LARGER * grown,
        "plan_seconds": num * opening_a_shard(),
    }
    print(f"a list opens in {before['open_seconds']:.0f} s and takes {before['open_bytes'] / 1e9:.1f} GB")
    print(f"a plan that opens each shard takes {before['plan_seconds']:.0f} s")
    within = all(
        found[step]["seconds"] < LIMIT_SECONDS and found[step]["peak_bytes"] < LIMIT_BYTES
        for step in ("open", "plan", "order")
    )
    common.print_result(
        {
            "shards": num,
            "table_bytes": table_bytes,
            "list_bytes": list_bytes,
            **found,
            "within_2s_and_500MB": within,
            "as_it_was": before,
            "plan_seconds_per_million_rows": hashing(),
        }
    )


if __name__ == "__main__":
    main()
