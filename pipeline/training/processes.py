"""Seeds of a run in processes of their own, side by side, or one after the other in the ranks of torchrun."""

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from pipeline.runtime import hardware
from pipeline.runtime.progress import bars
from pipeline.training.job import Job, TrainedSeed
from storage.errors import TrainingError

PROGRESS_SECONDS = 0.5
SEEDS_PER_CORE = 2  # three seeds on two cores end sooner when they share them than in two rounds
# Imported once, then forked; each seed would import all but the first later, in two seconds.
PRELOADED = ["pipeline.training.seed", "torch._dynamo", "pyarrow.dataset", "pandas"]


class _Failure(NamedTuple):
    """The error that ended a seed."""

    error: Exception
    traceback: str


def train_side_by_side(name: str, jobs: list[Job], seeds_at_once: int | None) -> list[TrainedSeed]:
    """Train the jobs in processes side by side, with a bar each; they share the cores.

    The first error ends all.
    """
    if hardware.ranks()[1] > 1:
        return train_in_ranks(jobs)
    at_once = min(len(jobs), seeds_at_once or SEEDS_PER_CORE * hardware.num_cores())
    threads = max(1, hardware.num_cores() // at_once)
    jobs = [job._replace(threads=threads) for job in jobs]
    waiting = list(reversed(range(len(jobs))))
    running: dict[Connection[Any, Any], tuple[int, BaseProcess]] = {}
    trained: dict[int, TrainedSeed] = {}
    bar_of: dict[int, Callable[[int], None]] = {}
    with bars("targets") as add:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    pipe, process = _start(jobs[waiting[-1]])
                    running[pipe] = waiting.pop(), process
                ready = set(wait(list(running)))
                for pipe in [pipe for pipe in running if pipe in ready]:
                    place, process = running[pipe]
                    message = _receive(name, jobs[place], pipe)
                    if not isinstance(message, int):
                        trained[place] = message
                        del running[pipe]
                        process.join()
                    elif place in bar_of:
                        bar_of[place](message)
                    else:  # the first number is that of all its targets
                        bar_of[place] = add(f"training {name}, {jobs[place].label}", message)
        finally:
            for _, process in running.values():
                process.terminate()
                process.join()
    return [trained[place] for place in range(len(jobs))]


def start_importing() -> None:
    """Let the process that seeds are forked from import torch while this process checks its inputs."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def _start(job: Job) -> "tuple[Connection[Any, Any], BaseProcess]":
    """A process that trains one seed, and the pipe of its messages."""
    context = mp.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train_seed, args=(job, sender), daemon=True)
    process.start()
    sender.close()  # so that the pipe ends with the process, however that ends
    return receiver, process


def _train_seed(job: Job, sender: "Connection[Any, Any]") -> None:
    """In a process of its own: send the number of targets in all, those that are done, then the result."""
    try:
        from pipeline.training.seed import train_seed  # here, so that the parent process never imports torch

        sender.send(train_seed(job, sender.send, PROGRESS_SECONDS))
    except Exception as error:
        sender.send(_Failure(error, traceback.format_exc()))


def _receive(name: str, job: Job, pipe: "Connection[Any, Any]") -> int | TrainedSeed:
    """The next message from a seed's process. Raises its error; TrainingError where the process is gone."""
    try:
        message: int | TrainedSeed | _Failure = pipe.recv()
    except EOFError:
        raise TrainingError(
            f"runs.{name}, {job.label}: its process ended without a result (see above).\n"
            "If memory was short, lower workers.seeds_at_once."
        ) from None
    if not isinstance(message, _Failure):
        return message
    cause = RuntimeError(f"in the process of {job.label}:\n{message.traceback}")
    if isinstance(message.error, TrainingError):
        raise TrainingError(f"runs.{name}, {job.label}: {message.error}") from cause
    raise message.error from cause


def train_in_ranks(jobs: list[Job]) -> list[TrainedSeed]:
    """Train the jobs in this process, together with the other ranks: all of them have the same jobs."""
    from pipeline.training.seed import train_seed  # torch

    threads = max(1, hardware.num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return [train_seed(job._replace(threads=threads)) for job in jobs]
