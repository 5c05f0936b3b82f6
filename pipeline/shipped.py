"""What the report says of exports: each student as torch, ONNX and int8 ONNX, beside each other."""

from collections.abc import Sequence
from typing import Any

from pipeline.findings import Row

FORMS = ("torch", "float32", "int8")


def shipped(exports: Sequence[Row], dataset: str) -> dict[str, Any] | None:
    """The exports of a dataset's runs, the fastest first; and those that are none, with the reason."""
    own = [row for row in exports if row["about"]["dataset"] == dataset]
    made = [row for row in own if "int8" in row]
    made.sort(key=lambda row: row["int8"]["latency_ms_batch_1"])
    refused = [row["about"] for row in own if "int8" not in row]
    if not made:
        return None
    lines = [
        {
            "name": row["about"]["name"],
            "seed": row["about"]["seed"],
            "forms": [row[form] for form in FORMS],
            "times": row["torch"]["latency_ms_batch_1"] / row["int8"]["latency_ms_batch_1"],
        }
        for row in made
    ]
    return {"lines": lines, "refused": refused, "machine": made[0]["about"]["machine"]}
