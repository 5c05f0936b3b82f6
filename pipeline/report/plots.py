"""The report's plots: results -> SVG text, the same bytes for the same numbers.

The colour is that of the recipe, the marker that of the student; teachers are black.
"""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

COLOURS = ("#7a8793", "#2f6fb0", "#c2571a", "#3d8b57", "#8b5fa8", "#b8912f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a name is not mathematics
    "svg.hashsalt": "stillroom",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#889",
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


class Point(NamedTuple):
    """One run, or a teacher (recipe None), in a scatter plot."""

    name: str
    student: str | None
    recipe: str | None
    x: float
    y: float
    y_std: float | None


class Line(NamedTuple):
    """One learning curve."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


class Palette:
    """One colour a recipe, one marker a student, the same in every plot of a page."""

    def __init__(self, students: Sequence[str], recipes: Sequence[str]) -> None:
        self._colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(recipes)}
        self._markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(students)}

    def colour(self, recipe: str | None) -> str:
        """The recipe's colour; black for a teacher."""
        return self._colours.get(recipe, "#111") if recipe else "#111"

    def marker(self, student: str | None) -> str:
        """The student's marker; a star for a teacher."""
        return self._markers.get(student, "o") if student else "*"


def scatter(points: Sequence[Point], x_label: str, palette: Palette, y_label: str, percent: bool) -> str:
    """Quality against a cost on a logarithmic axis; names next to the points, bars for the spread.

    `percent`: quality is a share; otherwise a number on a logarithmic axis.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 4.0))
        axes = figure.add_subplot()
        for point in points:
            colour = palette.colour(point.recipe)
            axes.errorbar(
                point.x, point.y, yerr=point.y_std, fmt=palette.marker(point.student), color=colour,
                capsize=2, markersize=11 if point.recipe is None else 7, elinewidth=1,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.25, y=0.12)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        _name_points(axes, points, palette)
        return _svg(figure)


def curves(
    panels: Sequence[tuple[str, Sequence[tuple[str, Line, Sequence[Line]]]]],
    palette: Palette,
    y_label: str,
    percent: bool,
) -> str:
    """A panel a student: (student, [(recipe, mean line, lines of the seeds)])."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(4.2, 3.4 * len(panels)), 3.1))
        for place, (student, lines) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1)
            for recipe, mean, seeds in lines:
                colour = palette.colour(recipe)
                for line in seeds:
                    axes.plot(line.xs, line.ys, color=colour, linewidth=0.7, alpha=0.35)
                axes.plot(mean.xs, mean.ys, color=colour, linewidth=2, label=recipe)
            axes.set_title(student, fontsize=10)
            axes.set_xlabel("rows seen")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
            if percent:
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.legend(loc="lower right" if percent else "upper right")
            if place == 0:
                axes.set_ylabel(y_label)
        return _svg(figure)


def shares(names: Sequence[str], parts: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """Stacked bars of shares of rows: parts are (label, one share a name, colour)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 0.3 * len(names)))
        axes = figure.add_subplot()
        left = [0.0] * len(names)
        for label, values, colour in parts:
            axes.barh(names, values, left=left, color=colour, label=label, height=0.7)
            for row, (value, start) in enumerate(zip(values, left, strict=True)):
                if value > 0.035:
                    axes.text(
                        start + value / 2,
                        row,
                        f"{value:.0%}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="w",
                    )
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False)
        axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return _svg(figure)


def bars(names: Sequence[str], values: Sequence[float], colours: Sequence[str], x_label: str) -> str:
    """Horizontal bars with their values."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 0.3 * len(names)))
        axes = figure.add_subplot()
        axes.barh(names, values, color=colours, height=0.7)
        for row, value in enumerate(values):
            axes.text(value, row, f" {value:,.0f}", va="center", fontsize=8.5)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(x_label)
        axes.grid(visible=False, axis="y")
        return _svg(figure)


def break_even(without: Sequence[float], with_cache: Sequence[float], at: int | None) -> str:
    """Cumulative teacher seconds after 0, 1, 2, ... trainings, without and with the cache."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2))
        axes = figure.add_subplot()
        axes.step(
            range(len(without)),
            without,
            where="post",
            color=COLOURS[2],
            linewidth=2,
            label="teacher run for every training",
        )
        axes.step(
            range(len(with_cache)),
            with_cache,
            where="post",
            color=COLOURS[1],
            linewidth=2,
            label="teacher run once, cached",
        )
        if at is not None:
            axes.axvline(at, color="#889", linestyle=":", linewidth=1.2)
            axes.text(at, max(without) / 2, f" paid for after {at}", fontsize=9, va="center")
        axes.set_xlabel("students trained (one run, one seed)")
        axes.set_ylabel("teacher's seconds")
        axes.legend(loc="upper left")
        return _svg(figure)


def _name_points(axes: Axes, points: Sequence[Point], palette: Palette) -> None:
    """Write names to the right of points; names that would overlap are moved up, the lowest first."""
    axes.figure.canvas.draw()
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: p.y):
        x, y = axes.transData.transform((point.x, point.y))
        place = y
        while any(abs(place - other) < 13 and abs(x - near) < 95 for near, other in taken):
            place += 3
        taken.append((x, place))
        axes.annotate(
            point.name, (point.x, point.y), xytext=(8, (place - y) * 72 / axes.figure.dpi - 3),
            textcoords="offset points", fontsize=8.5, color=palette.colour(point.recipe),
        )  # fmt: skip


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]
