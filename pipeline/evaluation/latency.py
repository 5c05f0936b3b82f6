"""Milliseconds of one call of a model, on one thread of a CPU."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.inputs import Inputs
from pipeline.runtime import hardware
from pipeline.streaming.model_inputs import InputTensors, input_tensors

LATENCY_WARMUP, LATENCY_REPEATS = 3, 25
LATENCY_SECONDS, LATENCY_LEAST = 1.5, 3  # slow models are called less often
BATCH_SIZES = (1, 32)  # rows

ModelCall = Callable[[InputTensors], object]


def latencies(
    models: Mapping[str, ModelCall], inputs: Inputs, rows: npt.NDArray[np.int64], pad_id: int
) -> dict[str, dict[str, float]]:
    """name -> metrics: the median milliseconds of one call of each model, for each size of batches.

    From model inputs to outputs, on one thread, on other rows each time.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for size in BATCH_SIZES:
        for name, milliseconds in _medians(models, inputs, rows, pad_id, size).items():
            found[name][f"latency_ms_batch_{size}"] = milliseconds
    return found


def _medians(
    models: Mapping[str, ModelCall], inputs: Inputs, rows: npt.NDArray[np.int64], pad_id: int, size: int
) -> dict[str, float]:
    """Median milliseconds of each model. They take turns: a slow moment of the machine hits all of them."""
    chosen = np.resize(rows, (LATENCY_WARMUP + LATENCY_REPEATS) * size).reshape(-1, size)
    times: dict[str, list[float]] = {name: [] for name in models}
    threads = torch.get_num_threads()
    hardware.pin_threads(1)
    try:
        with torch.inference_mode():
            for calls, batch in enumerate(chosen, 1):
                tensors = input_tensors(inputs.padded(batch, pad_id))
                for name, call in models.items():
                    started = time.perf_counter()
                    call(tensors)
                    times[name].append(time.perf_counter() - started)
                spent = sum(map(sum, times.values())) / len(models)
                if spent > LATENCY_SECONDS and calls >= LATENCY_WARMUP + LATENCY_LEAST:
                    break
    finally:
        hardware.pin_threads(threads)
    return {name: 1000 * float(np.median(found[LATENCY_WARMUP:])) for name, found in times.items()}
