"""Milliseconds of a model's answer, on one thread of a CPU."""

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

Answer = Callable[[InputTensors], object]  # a call of a model


def latency(
    answer: Answer,
    tokens: Inputs,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    size: int,
) -> float:
    """Median milliseconds of one call on `size` rows, tokens to logits, on one thread; always other rows."""
    return latencies({"": answer}, tokens, rows, pad_id, size)[""]


def latencies(
    ways: Mapping[str, Answer],
    tokens: Inputs,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    size: int,
) -> dict[str, float]:
    """The same of several ways to answer, which take turns: a slow moment of the machine hits all alike."""
    picked = np.resize(rows, (LATENCY_WARMUP + LATENCY_REPEATS) * size).reshape(-1, size)
    times: dict[str, list[float]] = {name: [] for name in ways}
    threads = torch.get_num_threads()
    hardware.pin_threads(1)
    try:
        with torch.inference_mode():
            for calls, batch in enumerate(picked, 1):
                inputs = input_tensors(tokens.padded(batch, pad_id))
                for name, answer in ways.items():
                    started = time.perf_counter()
                    answer(inputs)
                    times[name].append(time.perf_counter() - started)
                spent = sum(map(sum, times.values())) / len(ways)
                if spent > LATENCY_SECONDS and calls >= LATENCY_WARMUP + LATENCY_LEAST:
                    break
    finally:
        hardware.pin_threads(threads)
    return {name: 1000 * float(np.median(found[LATENCY_WARMUP:])) for name, found in times.items()}
