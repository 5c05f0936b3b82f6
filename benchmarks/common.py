"""Helpers of all benchmarks: interleaved medians, processes of their own, and one last line of JSON."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def medians(ways: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each way. Ways take turns, so that a slow minute of the machine affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure_alone(step: Callable[[], object], rounds: int) -> None:
    """In a process of its own: print the median seconds of `step`, and its peak memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which loading has raised
    before = _kilobytes("VmRSS")
    seconds = medians({"step": step}, rounds)["step"]
    print(json.dumps([seconds, 1024 * (_kilobytes("VmHWM") - before)]))


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def run_alone(file: str, *arguments: str) -> tuple[float, float]:
    """(seconds, bytes at the peak) that `file` prints when it is run with these arguments (measure_alone)."""
    command = [sys.executable, file, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def print_result(result: dict[str, Any]) -> None:
    """Print the result as the last line, with the machine's name."""
    from pipeline.runtime import hardware

    print(json.dumps({**result, "machine": hardware.machine()}))
