"""A logit shard against JSON lines and one .pt file a row: bytes a row, and rows/s read with all checks.

40,000 rows of two classes. Last line: JSON with bytes a row and read rates relative to the best alternative.
"""

import json
import tempfile
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import torch

from storage import records
from storage.checksums import check_files, file_entry
from storage.fingerprints import row_id

ROWS, CLASSES, PT_ROWS = 40_000, 2, 1000


def main() -> None:
    names = [row_id("bench", str(i)) for i in range(ROWS)]
    logits_NC = np.random.default_rng(0).normal(size=(ROWS, CLASSES)).astype(np.float32)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        rows = records.LogitRows(pa.array(names), pa.array(names), np.full(ROWS, 20, np.int32), logits_NC)
        records.write(root / "shard.parquet", rows, ("negative", "positive"))
        entry = file_entry(root, "shard.parquet")
        with (root / "rows.jsonl").open("w") as file:
            for name, row in zip(names, logits_NC.tolist(), strict=True):
                file.write(json.dumps({"row_id": name, "logits": row}) + "\n")
        for i in range(PT_ROWS):
            torch.save({"row_id": names[i], "logits": torch.from_numpy(logits_NC[i])}, root / f"{i}.pt")
        pt_bytes = sum((root / f"{i}.pt").stat().st_size for i in range(PT_ROWS)) / PT_ROWS

        def ours() -> None:
            check_files(root, [entry])
            torch.from_numpy(records.read(root / "shard.parquet", CLASSES).logits)

        def lines() -> None:
            with (root / "rows.jsonl").open() as file:
                torch.tensor([json.loads(line)["logits"] for line in file])

        def files() -> None:
            torch.stack([torch.load(root / f"{i}.pt")["logits"] for i in range(PT_ROWS)])

        seconds = common.medians({"shard": ours, "jsonl": lines, "pt": files}, rounds=5)
        sizes = {
            "shard": entry.bytes / ROWS,
            "jsonl": (root / "rows.jsonl").stat().st_size / ROWS,
            "pt": pt_bytes,
        }
    rates = {name: (PT_ROWS if name == "pt" else ROWS) / s for name, s in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:6} {sizes[name]:8,.1f} bytes a row  {rate:12,.0f} rows/s")
    best = max(rates["jsonl"], rates["pt"])
    common.print_result(
        {"bytes_a_row": sizes, "read_over_best": rates["shard"] / best, "rows_per_s": rates["shard"]}
    )


if __name__ == "__main__":
    main()
