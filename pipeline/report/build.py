"""Results -> one self-contained HTML page: tables, plots, and the time that the cache saved.

Reads JSON, never a model.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from pipeline.report import plots
from pipeline.report.comparison import compare_families, paired_differences
from pipeline.report.headline import headline
from pipeline.report.tables import choice_table, export_table, metrics_table, spread_of
from pipeline.report.views import Row, View, metric_mean, teacher_of, view_of
from storage.errors import AssetError

TEMPLATE = Path(__file__).parent / "report.html.j2"

AGREEMENT = (
    ("both_right", "both right", "#3d8b57"),
    ("only_teacher_right", "only the teacher", "#2f6fb0"),
    ("only_student_right", "only the student", "#b8912f"),
    ("both_wrong", "both wrong", "#a23b3b"),
)


class BreakEven(NamedTuple):
    """The teacher's time with and without a cache."""

    without: list[float]  # cumulative seconds after 0, 1, 2, ... trainings
    with_cache: list[float]
    after: int | None  # trainings after which the cache has paid for itself


def build_report(eval_dir: Path, capture_dir: Path, models_dir: Path, export_dir: Path, out: Path) -> None:
    """Write the report over all results, the dataset with the most of them first.

    Raises AssetError where a run's training record is missing.
    """
    rows = [_row(path) for path in sorted(eval_dir.glob("*.json"))]
    if not rows:
        raise AssetError(f"there are no results in {eval_dir}: run `dvc repro` first.")
    captures = [_read(path) for path in sorted(capture_dir.glob("*.json"))]
    exports = [_read(path) for path in sorted(export_dir.glob("*.json"))]
    training = {row["name"]: _training(models_dir, row) for row in rows if row["kind"] == "run"}
    on = Counter(row["dataset"] for row in rows)
    sections = [
        section([row for row in rows if row["dataset"] == dataset], captures, training, exports)
        for dataset in sorted(on, key=lambda name: (-on[name], name))
    ]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text()).render(sections=sections)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)


def section(
    rows: Sequence[Row], captures: Sequence[Row], training: dict[str, Row], exports: Sequence[Row]
) -> dict[str, Any]:
    """What the page shows of one dataset, by the names of the template."""
    shown = view_of(rows)
    teachers = [row for row in rows if row["kind"] == "teacher"]
    runs = sorted((row for row in rows if row["kind"] == "run"), key=lambda r: (r["student"], r["recipe"]))
    runs = [_with_training(row, training[row["name"]]) for row in runs]
    runs = [_compared(row, runs, teachers, shown) for row in runs]
    read = {name for row in runs for name in _caches(row)}
    used = [c for c in captures if c["cache"] in read]
    palette = plots.Palette(_distinct(runs, "student"), _distinct(runs, "recipe"))
    saved = break_even(runs, used, training)
    scored = [row for row in [*teachers, *runs] if metric_mean(row, shown.metric) is not None]
    return {
        "dataset": rows[0]["dataset"],
        "headline": headline(runs, teachers, shown),
        "shown": shown,
        "table": metrics_table(teachers, runs, shown),
        "size": _scatter(scored, "bytes", 1e-6, "MB on disk", shown, palette),
        "speed": _scatter(scored, shown.speed, 1.0, shown.speed_axis, shown, palette),
        "curves": plots.curves(_panels(runs, training, shown), palette, shown.curve_axis, shown.percent)
        if runs
        else "",
        "choices": [
            choice_table(row["name"], training[row["name"]], shown)
            for row in runs
            if "choice" in training[row["name"]]
        ],
        "fair": compare_families(runs, shown),
        "shipped": export_table(exports, rows[0]["dataset"]),
        "agreement": _agreement(runs),
        "lines": [row for row in [*teachers, *runs] if row.get("lines")],
        "time": _time(used, runs),
        "saved": saved,
        "break_even": plots.break_even(saved.without, saved.with_cache, saved.after) if saved else "",
        "captures": used,
        "machine": rows[0]["machine"],
        "threads": rows[0]["threads"],
        "split": rows[0]["split"],
        "rows": rows[0]["rows"],
    }


def _with_training(row: Row, record: Row) -> Row:
    """The row with its recipe's family, and whether its training read the teacher."""
    facts = {"distilled": _teacher_rows(record) > 0, "family": record["family"]}
    return {**row, **_multitask_recipe(row), **facts}


def break_even(runs: Sequence[Row], captures: Sequence[Row], training: dict[str, Row]) -> BreakEven | None:
    """The teacher's time without a cache, where each training runs it, and with one capture; None where no
    run read the teacher.
    """
    rates = {c["cache"]: c["seconds"] / c["rows"] for c in captures if c["rows"]}
    without = [0.0]
    for row in runs:
        for seed in training[row["name"]]["seeds"]:
            if rates.keys() >= {*_caches(row)} and seed["teacher_rows_seen"]:
                seconds_a_row = sum(rates[name] for name in _caches(row))
                without.append(without[-1] + seed["teacher_rows_seen"] * seconds_a_row)
    if len(without) == 1:
        return None
    paid = sum(c["seconds"] for c in captures)
    after = next((count for count, seconds in enumerate(without) if seconds >= paid), None)
    return BreakEven(without, [paid] * len(without), after)


def _compared(row: Row, runs: Sequence[Row], teachers: Sequence[Row], shown: View) -> Row:
    """The row with two more metrics: the gain over the same student on labels alone, paired by seed, and the
    share of its teacher's metric, where the table has it.
    """
    metrics = dict(row["metrics"])
    name = shown.compared[0]
    if metric_mean(row, name) is None:
        return row
    alone = [r for r in runs if r["student"] == row["student"] and "run" not in r]
    plain = next((r for r in alone if not r["distilled"]), None)
    if plain is not None and plain["name"] != row["name"] and metric_mean(plain, name) is not None:
        gains = paired_differences(row, plain, shown)
        if gains:
            metrics["over_labels"] = spread_of(gains)
    teacher = teacher_of(row, teachers, shown)
    if teacher is not None and shown.of_teacher:
        found = metrics[shown.metric]["values"]
        metrics["of_teacher"] = spread_of([value / metric_mean(teacher, shown.metric) for value in found])
    return {**row, "metrics": metrics}


def _caches(row: Row) -> list[str]:
    """The caches that a run learned from: those of its mixture, or one."""
    return row.get("caches") or [row["cache"]]


def _teacher_rows(training: Row) -> int:
    return sum(seed["teacher_rows_seen"] for seed in training["seeds"])


def _scatter(
    rows: Sequence[Row], cost: str, scale: float, label: str, shown: View, palette: plots.Palette
) -> str:
    points = [
        plots.Point(
            row["name"], row["student"], row["recipe"], metric_mean(row, cost) * scale,
            metric_mean(row, shown.metric),
            row["metrics"][shown.metric].get("std"),
        )
        for row in rows
    ]  # fmt: skip
    return plots.scatter(points, label, palette, shown.axis, shown.percent)


def _panels(runs: Sequence[Row], training: dict[str, Row], shown: View) -> list[Any]:
    panels = []
    for student in _distinct(runs, "student"):
        lines = []
        for row in (r for r in runs if r["student"] == student):
            seeds = [
                plots.Line(
                    str(s["seed"]),
                    [p["rows"] for p in s["curve"]],
                    [p[shown.curve] for p in s["curve"]],
                )
                for s in training[row["name"]]["seeds"]
            ]
            shortest = min((line.xs for line in seeds), key=len)
            mean = [sum(line.ys[i] for line in seeds) / len(seeds) for i in range(len(shortest))]
            lines.append((row["recipe"], plots.Line("mean", shortest, mean), seeds if len(seeds) > 1 else []))
        panels.append((student, lines))
    return panels


def _agreement(runs: Sequence[Row]) -> str:
    """Shares of rows that student and teacher get right; empty where there are no such metrics."""
    known = [row for row in runs if metric_mean(row, "both_right") is not None]
    if not known:
        return ""
    ranked = sorted(known, key=lambda row: -metric_mean(row, "both_right"))
    parts = [(label, [metric_mean(row, name) for row in ranked], colour) for name, label, colour in AGREEMENT]
    return plots.shares([row["name"] for row in ranked], parts)


def _time(captures: Sequence[Row], runs: Sequence[Row]) -> str:
    fine_tuned = {c["teacher"]: c["teacher_train_seconds"] for c in captures if c["teacher_train_seconds"]}
    items = [(f"fine-tuning {teacher}", seconds, "#111") for teacher, seconds in fine_tuned.items()]
    items += [(f"capturing {c['cache']}", c["seconds"], "#2f6fb0") for c in captures]
    trained = {r.get("run", r["name"]): metric_mean(r, "train_seconds") * len(r["seeds"]) for r in runs}
    items += [(f"training {name}", seconds, "#b8912f") for name, seconds in trained.items()]
    names, values, colours = zip(*items, strict=True) if items else ((), (), ())
    return plots.bars(names, values, colours, "core-seconds, all seeds") if items else ""


def _distinct(rows: Sequence[Row], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _row(path: Path) -> Row:
    content = _read(path)
    about: Row = content.pop("about")
    return {**about, "metrics": content}


def _training(models_dir: Path, row: Row) -> Row:
    """The record of a run's training; of a part of a multitask run, its part of the record."""
    record = _read(models_dir / (row.get("run") or row["name"]) / "training.json")
    return record["tasks"][row["name"]] if "run" in row else record


def _multitask_recipe(row: Row) -> Row:
    """Another recipe name for a part of a multitask run: its results are not those of the recipe alone."""
    return {"recipe": f"{row['recipe']}, in {row['run']}"} if "run" in row else {}


def _read(path: Path) -> Row:
    if not path.is_file():
        raise AssetError(f"{path} is missing: run `dvc repro`, or fetch it with `dvc pull {path.parent}`.")
    content: Row = json.loads(path.read_text())
    return content
