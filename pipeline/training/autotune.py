"""How a language model's training step is fastest on this machine: found by trying, not by rule.

Which of one thread and all, of float32 and bfloat16, wins depends on the processor, the model's width and
what else runs. Every choice gives the same training up to rounding; the run's record says which was taken.
"""

import contextlib
import itertools
import time
from typing import Literal, NamedTuple

import torch

from pipeline.runtime import hardware
from pipeline.training.workload import Workload

TRIES = 2
HOPELESS = 2.0  # a first try so many times slower than the best is not tried again
WORTH = 0.9  # bfloat16 costs precision: it is taken where a step needs at most this share of float32's time

Precision = Literal["float32", "bfloat16"]


class StepSetup(NamedTuple):
    """How a step is run."""

    threads: int
    precision: Precision
    seconds_per_step: dict[str, float]  # of everything that was tried


def fastest_setup(
    model: torch.nn.Module, lesson: Workload, threads: int, precision: Literal["auto", "float32", "bfloat16"]
) -> StepSetup:
    """The fastest of one thread and `threads`, and of the precisions that are allowed.

    Tries steps of the first batch; weights stay as they are.
    """
    batches = lesson.batches(0)
    batch = next(iter(batches)).to(next(model.parameters()).device)
    batches.close()
    allowed: tuple[Precision, ...] = ("float32",) if precision == "auto" else (precision,)
    if precision == "auto" and hardware.computes_in_bfloat16():  # emulated, one try would take a minute
        allowed = ("float32", "bfloat16")
    found: dict[tuple[int, Precision], float] = {}
    model.train()
    for setting in itertools.product(sorted({threads, 1}, reverse=True), allowed):
        hardware.pin_threads(setting[0])
        autocast = torch.autocast(batch.labels_T.device.type, torch.bfloat16)
        best = float("inf")
        for _ in range(1 + TRIES):
            started = time.perf_counter()
            with autocast if setting[1] == "bfloat16" else contextlib.nullcontext():
                lesson.loss(model, batch, 0.0).backward()  # type: ignore[no-untyped-call]
            best = min(best, time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
            if best > HOPELESS * min(found.values(), default=float("inf")):
                break
        found[setting] = best
    chosen = min(found, key=lambda setting: found[setting] * (WORTH if setting[1] == "float32" else 1))
    told = {f"{name}, {count} threads": round(seconds, 4) for (count, name), seconds in found.items()}
    return StepSetup(*chosen, told)
