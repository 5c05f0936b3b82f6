"""The report's tables: metrics of runs, chosen numbers, exports."""

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline.report.views import Row, View, metric_mean


def metrics_table(teachers: Sequence[Row], runs: Sequence[Row], shown: View) -> list[dict[str, Any]]:
    """The rows of the table as text; the best student of each column is marked."""
    best = {}
    for name, _, kind, more in shown.columns:
        means = [m for row in runs if (m := metric_mean(row, name)) is not None]
        if means and more is not None and len(runs) > 1:
            best[name] = format_metric(max(means) if more else min(means), kind)
    lines = []
    for row in [*teachers, *runs]:
        cells = []
        for name, _, kind, _ in shown.columns:
            text = format_metric(metric_mean(row, name), kind)
            spread = (
                format_metric(row["metrics"].get(name, {}).get("std"), kind)
                if name not in ("parameters", "bytes")
                else ""
            )
            marked = row["kind"] == "run" and text == best.get(name)
            cells.append(
                {"text": text, "spread": "" if spread == "–" else spread.lstrip("+"), "best": marked}
            )
        lines.append({"name": row["name"], "kind": row["kind"], "seeds": len(row["seeds"]), "cells": cells})
    return lines


def choice_table(name: str, training: Row, shown: View) -> dict[str, Any]:
    """What a run's numbers were chosen from, as text: a line a candidate, means over the folds."""
    choice = training["choice"]
    kinds = {"accuracy": "percent" if shown.percent else "plain", "loss": "plain"}
    lines = []
    for tried in choice["candidates"]:
        scores = {score: spread_of(tried[score]) for score in kinds}
        cells = [
            {
                "text": format_metric(scores[score]["mean"], kind),
                "spread": format_metric(scores[score]["std"], kind),
            }
            for score, kind in kinds.items()
        ]
        said = ", ".join(f"{field} {value}" for field, value in tried["values"].items())
        lines.append({"name": said, "cells": cells, "best": tried["values"] == choice["chosen"]})
    return {**choice, "name": name, "lines": lines}


def format_metric(value: float | None, kind: str) -> str:
    """A metric as text."""
    if value is None:
        return "–"
    return {
        "percent": f"{100 * value:.1f} %",
        "points": f"{value:+.1f}",
        "nats": f"{value:+.3f}",
        "perplexity": f"{value:,.1f}",
        "plain": f"{value:.3f}",
        "count": f"{value / 1e6:,.2f} M",
        "megabytes": f"{value / 1e6:,.1f}",
        "milliseconds": f"{value:.2f}",
        "seconds": f"{value:,.0f}",
    }[kind]


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """A metric as the results have it. The standard deviation is that of a sample; one value has none."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


FORMS = ("torch", "float32", "int8")


def export_table(exports: Sequence[Row], dataset: str) -> dict[str, Any] | None:
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
