"""Seeds of a run in processes of their own, side by side, or one after the other in the ranks of torchrun."""

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.runtime import hardware
from pipeline.runtime.progress import bars
from pipeline.training.job import Job
from storage.errors import TrainingError

if TYPE_CHECKING:
    from pipeline.training.job import TrainedSeed


PROGRESS_SECONDS = 0.5
SEEDS_PER_CORE = 2  # three seeds on two cores end sooner sharing them than in two turns
# Imported once, then forked; all but the first would be imported late by every seed, for two seconds.
PRELOADED = ["pipeline.training.seed", "torch._dynamo", "pyarrow.dataset", "pandas"]


class _Failure(NamedTuple):
    """What ended a seed."""

    error: Exception
    traceback: str


def train_side_by_side(name: str, jobs: list[Job], seeds_at_once: int | None) -> list["TrainedSeed"]:
    """Train the jobs in processes side by side, with a bar each; they share the cores. The first error ends
    all."""
    if hardware.ranks()[1] > 1:
        return train_in_ranks(jobs)
    at_once = min(len(jobs), seeds_at_once or SEEDS_PER_CORE * hardware.num_cores())
    threads = max(1, hardware.num_cores() // at_once)
    jobs = [job._replace(threads=threads) for job in jobs]
    waiting = list(reversed(range(len(jobs))))
    running: dict[Connection[Any, Any], tuple[int, BaseProcess]] = {}
    trained: dict[int, TrainedSeed] = {}
    advance: dict[int, Callable[[int], None]] = {}
    with bars("targets") as add:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    pipe, process = _start(jobs[waiting[-1]])
                    running[pipe] = waiting.pop(), process
                ready = set(wait(list(running)))
                for pipe in [pipe for pipe in running if pipe in ready]:
                    place, process = running[pipe]
                    news = _hear(name, jobs[place], pipe)
                    if not isinstance(news, int):
                        trained[place] = news
                        del running[pipe]
                        process.join()
                    elif place in advance:
                        advance[place](news)
                    else:  # the first number is that of all its rows
                        advance[place] = add(f"training {name}, {jobs[place].label}", news)
        finally:
            for _, process in running.values():
                process.terminate()
                process.join()
    return [trained[place] for place in range(len(jobs))]


def start_importing() -> None:
    """Let the process that seeds are forked from import torch while this one looks at its inputs."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


def _start(job: Job) -> "tuple[Connection[Any, Any], BaseProcess]":
    """A process that trains one seed, and the pipe that it tells of it through."""
    context = mp.get_context("forkserver")
    hears, tells = context.Pipe(duplex=False)
    process = context.Process(target=_train_seed, args=(job, tells), daemon=True)
    process.start()
    tells.close()  # so that the pipe ends with the process, however that ends
    return hears, process


def _train_seed(job: Job, tells: "Connection[Any, Any]") -> None:
    """In a process of its own: send rows as they are done, then what became of the seed, or the error."""
    try:
        from pipeline.training.seed import (
            train_seed,  # by name, so that the process above never imports torch
        )

        tells.send(train_seed(job, tells.send, PROGRESS_SECONDS))
    except Exception as error:
        tells.send(_Failure(error, traceback.format_exc()))


def _hear(name: str, job: Job, pipe: "Connection[Any, Any]") -> "int | TrainedSeed":
    """The next news of a seed. Raises its error; TrainingError where it diverged or its process is gone."""
    try:
        news: int | TrainedSeed | _Failure = pipe.recv()
    except EOFError:
        raise TrainingError(
            f"runs.{name}, {job.label}: its process ended without a word (see above).\n"
            "If memory was short, lower workers.seeds_at_once."
        ) from None
    if not isinstance(news, _Failure):
        return news
    where = RuntimeError(f"in the process of {job.label}:\n{news.traceback}")
    if isinstance(news.error, TrainingError):
        raise TrainingError(f"runs.{name}, {job.label}: {news.error}") from where
    raise news.error from where


def train_in_ranks(jobs: "list[Job]") -> "list[TrainedSeed]":
    """Train the jobs in this process, together with its companions: all of them have the same jobs."""
    from pipeline.training.seed import train_seed  # torch

    threads = max(1, hardware.num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return [train_seed(job._replace(threads=threads)) for job in jobs]
