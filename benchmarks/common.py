"""What every benchmark needs: interleaved medians, and one closing line of JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def medians(ways: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each way. Ways take turns, so that a slow minute of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def close(result: dict[str, Any]) -> None:
    """Print the result as the last line, with the machine's name."""
    from pipeline import hardware

    print(json.dumps({**result, "machine": hardware.machine()}))
