"""A row of the results table: metrics over seeds, and what they are of."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data.rows import TEST
from pipeline.runtime import hardware

Metrics = dict[str, float | None]


def results_row(about: dict[str, Any], num_rows: int, seeds: Sequence[Metrics]) -> dict[str, Any]:
    """The content of results/eval/NAME.json, from the metrics of each seed over `num_rows` rows of the split.

    `about` names what was measured: kind (run or teacher), name, teacher and dataset first.
    """
    measured = {"split": TEST, "rows": num_rows, "machine": hardware.machine(), "threads": 1}
    return {**over_seeds(seeds), "about": about | measured}


def over_seeds(values: Sequence[Metrics]) -> dict[str, dict[str, Any]]:
    """Each metric as {"mean", "std", "values"} over seeds; std is that of a sample, None for one seed."""
    merged = {}
    for name in values[0]:
        column = [value[name] for value in values]
        known = [v for v in column if v is not None]
        complete = len(known) == len(column)
        merged[name] = {
            "mean": float(np.mean(known)) if complete else None,
            "std": float(np.std(known, ddof=1)) if complete and len(known) > 1 else None,
            "values": column,
        }
    return merged
