"""Progress bars with rate and time left, and log lines. All on stderr."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Item = TypeVar("Item")

console = Console(stderr=True, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else f"- {task.fields['unit']}/s")


def log(message: str) -> None:
    """Print one plain line for people; no program parses it."""
    console.print(message, markup=False)


@contextmanager
def bar(label: str, total: int, unit: str, window: float = 30) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` units with rate and time left; yields advance(units).

    The rate is that of the last `window` seconds, in which the bar should advance several times.
    """
    with bars(unit, window) as add:
        yield add(label, total)


def tracked(label: str, items: Sequence[Item], unit: str) -> Iterator[Item]:
    """The items, with a progress bar over them."""
    with bar(label, len(items), unit) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def bars(unit: str, window: float = 30) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Several bars below each other. Yields add(label, total), which returns advance(units).

    Where stderr is not a terminal, a full bar prints one line, so that logs stay readable.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    shown = Progress(*columns, console=console, disable=not sys.stderr.isatty(), speed_estimate_period=window)
    with shown as progress:

        def add(label: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(label, total=total, unit=unit)
            return lambda units: progress.advance(task, units)

        yield add
        if progress.disable:
            for task in progress.tasks:
                if task.finished:
                    log(f"{task.description}: {task.completed:,.0f} {unit} in {task.finished_time:,.1f} s")
