"""The fastest setup of a language model's training step on this machine: measured, not by rule.

Whether one thread or all, float32 or bfloat16 is fastest depends on the processor, the model's width and what
else runs. Every setup gives the same training up to rounding; the run's record has the one that was taken.
"""

import contextlib
import itertools
import time
from typing import Literal, NamedTuple

import torch

from pipeline.runtime import hardware
from pipeline.training.workload import Workload

TRIES = 2
HOPELESS = 2.0  # a setup whose first try takes this many times the best one is not tried again
WORTH = 0.9  # bfloat16 costs precision: it is taken where a step needs at most this share of float32's time

Precision = Literal["float32", "bfloat16"]


class StepSetup(NamedTuple):
    """How a step is run."""

    threads: int
    precision: Precision
    seconds_per_step: dict[str, float]  # of every setup that was tried


def fastest_setup(
    model: torch.nn.Module,
    workload: Workload,
    threads: int,
    precision: Literal["auto", "float32", "bfloat16"],
) -> StepSetup:
    """The fastest of one thread and `threads`, and of the precisions that are allowed.

    Runs steps of the first batch; weights stay as they are.
    """
    batches = workload.batches(0)
    batch = next(iter(batches)).to(next(model.parameters()).device)
    batches.close()
    allowed: tuple[Precision, ...] = ("float32",) if precision == "auto" else (precision,)
    if precision == "auto" and hardware.computes_in_bfloat16():  # emulated, one try would take a minute
        allowed = ("float32", "bfloat16")
    best: dict[tuple[int, Precision], float] = {}
    model.train()
    for setup in itertools.product(sorted({threads, 1}, reverse=True), allowed):
        hardware.pin_threads(setup[0])
        autocast = torch.autocast(batch.labels_T.device.type, torch.bfloat16)
        seconds = float("inf")
        for _ in range(1 + TRIES):
            started = time.perf_counter()
            with autocast if setup[1] == "bfloat16" else contextlib.nullcontext():
                workload.loss(model, batch, 0.0).backward()  # type: ignore[no-untyped-call]
            seconds = min(seconds, time.perf_counter() - started)
            model.zero_grad(set_to_none=True)
            if seconds > HOPELESS * min(best.values(), default=float("inf")):
                break
        best[setup] = seconds
    chosen = min(best, key=lambda setup: best[setup] * (WORTH if setup[1] == "float32" else 1))
    tried = {f"{name}, {count} threads": round(seconds, 4) for (count, name), seconds in best.items()}
    return StepSetup(*chosen, tried)
