"""Fair comparison: the gain from extra text, and the further gain from the teacher's probabilities.

Runs of a student are of four families (pipeline.config.recipes.Recipe.family): CE, CE + extra text (the
teacher's first choices as labels), KD, KD + extra text. Each is compared with labels alone, and KD with
labels on the same text; where a family has several runs, with the best. Differences are paired by seed. Their
interval is Student's t over seeds: it estimates whether training again would give the same order. A bootstrap
over test rows would estimate it for other test rows, and would ignore the variance between trainings.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy.special import stdtrit

from pipeline.report.views import Row, View, best_row, metric_mean

CONFIDENCE = 0.95
EXTRA = " + extra text"


class Difference(NamedTuple):
    """How much better one run is than another: the mean over the seeds that both have."""

    mean: float  # points, or in the unit of the metric (View.compared)
    low: float | None  # the interval's ends; None for a single pair
    high: float | None
    num_pairs: int

    @property
    def certain(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


def paired_differences(row: Row, base: Row, shown: View) -> list[float]:
    """How much better `row` is than `base`, for each seed that both have: points, or the metric's unit."""
    name, scale = shown.compared
    found, plain = (dict(zip(r["seeds"], r["metrics"][name]["values"], strict=True)) for r in (row, base))
    return [scale * (found[seed] - plain[seed]) for seed in found if seed in plain]


def mean_difference(differences: Sequence[float]) -> Difference | None:
    """The mean of paired differences with its 95 % interval of Student's t; None without differences."""
    if not differences:
        return None
    middle, num = statistics.fmean(differences), len(differences)
    if num == 1:
        return Difference(middle, None, None, num)
    half = float(stdtrit(num - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(differences) / math.sqrt(num)
    return Difference(middle, middle - half, middle + half, num)


def compare_families(runs: Sequence[Row], shown: View) -> list[dict[str, Any]]:
    """For each student that has runs to compare: its runs by family, each with its baselines."""
    compared = []
    for student in dict.fromkeys(row["student"] for row in runs):
        own = [
            row for row in runs if row["student"] == student and metric_mean(row, shown.metric) is not None
        ]
        plain = _baseline(own, "CE", shown)
        if plain is None or len(own) == 1:
            continue
        own.sort(key=lambda row: (row["family"], row["name"]))
        lines = []
        for row in own:
            same = _baseline(own, row["family"].replace("KD", "CE"), shown)
            over, beyond = (
                mean_difference(paired_differences(row, base, shown))
                if base is not None and base is not row
                else None
                for base in (plain, same if row["family"].startswith("KD") else None)
            )
            found = row["metrics"][shown.compared[0]]
            lines.append(
                {
                    "row": row,
                    "mean": found["mean"],
                    "spread": found["std"],
                    "over_labels": over,
                    "over_same_text": beyond,
                }
            )
        compared.append({"student": student, "lines": lines, "parts": _parts(lines)})
    return compared


def _baseline(rows: Sequence[Row], family: str, shown: View) -> Row | None:
    known = [row for row in rows if row["family"] == family]
    return best_row(known, shown) if known else None


def _parts(lines: Sequence[dict[str, Any]]) -> tuple[str, Difference, Difference] | None:
    """(run, its gain over labels alone, the part of it that is from probabilities), of the best run that has
    both baselines.
    """
    whole = [line for line in lines if line["row"]["family"] == f"KD{EXTRA}" and line["over_same_text"]]
    if not whole:
        return None
    first = max(whole, key=lambda line: line["over_labels"].mean)
    return first["row"]["name"], first["over_labels"], first["over_same_text"]
