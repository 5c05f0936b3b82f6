"""The report's tables: metrics of runs, chosen numbers, exports."""

import statistics
from collections.abc import Sequence
from typing import Any

from pipeline.report.views import Row, View, metric_mean


def metrics_table(teachers: Sequence[Row], runs: Sequence[Row], shown: View) -> list[dict[str, Any]]:
    """The lines of the table as text; the best student of each column is marked."""
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
    """The candidates of a run's recipe as text: a line each, means over the folds.

    The score of the objective is called accuracy in training.json, and by its own name here.
    """
    choice = training["choice"]
    kinds = {"accuracy": "percent" if shown.percent else "plain", "loss": "plain"}
    judged_by = shown.score if choice["judged_by"] == "accuracy" else "loss"
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
        values = ", ".join(f"{field} {value}" for field, value in tried["values"].items())
        lines.append({"name": values, "cells": cells, "best": tried["values"] == choice["chosen"]})
    return {**choice, "name": name, "lines": lines, "score": shown.score, "judged_by": judged_by}


def format_metric(value: float | None, kind: str) -> str:
    """A metric as text."""
    if value is None:
        return "–"
    return {
        "percent": f"{100 * value:.1f} %",
        "points": f"{value:+.1f}",
        "difference": f"{value:+.3f}",
        "perplexity": f"{value:,.1f}",
        "plain": f"{value:.3f}",
        "count": f"{value / 1e6:,.2f} M",
        "megabytes": f"{value / 1e6:,.1f}",
        "milliseconds": f"{value:.2f}",
        "seconds": f"{value:,.0f}",
    }[kind]


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """A metric in the form of the results. The standard deviation is that of a sample; None for one value."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


FORMS = ("torch", "float32", "int8")


def export_table(exports: Sequence[Row], dataset: str) -> dict[str, Any] | None:
    """The exported models of a dataset's runs, the fastest first, and the runs that were not exported, with
    the reason; None without an exported model.
    """
    own = [row for row in exports if row["about"]["dataset"] == dataset]
    exported = [row for row in own if "int8" in row]
    exported.sort(key=lambda row: row["int8"]["latency_ms_batch_1"])
    refused = [row["about"] for row in own if "int8" not in row]
    if not exported:
        return None
    lines = [
        {
            "name": row["about"]["name"],
            "seed": row["about"]["seed"],
            "forms": [row[form] for form in FORMS],
            "times": row["torch"]["latency_ms_batch_1"] / row["int8"]["latency_ms_batch_1"],
        }
        for row in exported
    ]
    return {"lines": lines, "refused": refused, "machine": exported[0]["about"]["machine"]}
