"""Captures by real processes of workers. Run as a program, it is a driver: `crew.py WORLD WORKERS`."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed.utils import get_mp_context

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.config.params import Workers
from pipeline.runtime import hardware
from tests import toy, warm
from tests.pipeline.conftest import World

SHARD_ROWS, SHARDS = 4, 45  # of the toy's 180 rows
# All that workers and seeds import: what is missing here, each of them imports for itself.
PRELOAD = [
    "distributed.http.worker", "pandas", "pyarrow.compute", "pyarrow.dataset", "torch._dynamo",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "zarr",
    "pipeline.capture.capture", "pipeline.capture.worker", "pipeline.training.seed",
]  # fmt: skip
INLINE = Workers(threads=1)


@contextlib.contextmanager
def quick_processes() -> Iterator[None]:
    """Within, worker processes are forked from one that has imported all that they need."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(PRELOAD)
        yield


def local(processes: int, **changes: Any) -> Workers:
    """Processes of this machine, one thread each; they are given up after ten minutes."""
    return Workers(
        **{"capture": "local", "processes": processes, "threads": 1, "shard_timeout": 600} | changes
    )


def compute(world: World, workers: Workers = INLINE, **changes: Any) -> Captured:
    """Capture in many small shards."""
    entry = world.entry(**{"shard_rows": SHARD_ROWS} | changes)
    job = CaptureJob("toy", entry, world.dataset, world.teacher, world.cache, world.store, workers=workers)
    return capture_cache(job)


def forget(world: World) -> None:
    """Nothing is captured any more."""
    for made in (world.cache, world.store.root):
        shutil.rmtree(made, ignore_errors=True)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def finished(world: World) -> set[str]:
    """The names of the finished shards of the store."""
    return {path.parent.name for path in world.store.root.glob("[0-9a-f]*/*/shard.json")}  # not those in tmp/


def processes(driver: int | None = None) -> list[int]:
    """The worker processes of a driver, or of this one, that live now: children of what forks them."""
    forked = [pid for child in warm.children(driver or os.getpid()) for pid in warm.children(child)]
    return [pid for pid in forked if not has_ended(pid)]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to collect its status."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def send(number: signal.Signals, pid: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def driver(world: World, processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """A capture by a process of its own, with this many workers; 0: inline. Killed at the end."""
    command = [warm.python(), "-m", "tests.pipeline.crew", str(world.root), str(processes)]
    with subprocess.Popen(command, cwd=toy.ROOT, stderr=subprocess.PIPE) as running:
        try:
            yield running
        finally:
            running.kill()


def address_of(scheduler: subprocess.Popen[bytes]) -> str:
    """The address that a scheduler prints."""
    assert scheduler.stderr is not None
    for line in scheduler.stderr:
        if found := re.search(rb"Scheduler at:\s+(tcp://\S+)", line):
            return found[1].decode()
    raise AssertionError("the scheduler did not start")


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Within, `act` runs in a thread of its own, and must have ended well when all else is done."""
    faults: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:  # raised again in the thread that waits
            faults.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if faults:
        raise faults[0]


def wait_for(moment: Callable[[], object], seconds: float = 900) -> None:
    """Return as soon as `moment` returns something true."""
    deadline = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


def check(world: World, undisturbed: dict[str, bytes], kept: Collection[str] = ()) -> None:
    """The sealed bytes are those of an undisturbed capture; no shard was lost, no file is left over."""
    found = content(world.cache)
    others = [name for name in {*found, *undisturbed} if found.get(name) != undisturbed.get(name)]
    assert not others, f"files that differ: {sorted(others)}"
    assert finished(world).issuperset(kept)
    assert len(finished(world)) == SHARDS, "and there are those of the plan alone"
    assert not list((world.store.root / "tmp").iterdir())
    assert not list(world.cache.parent.glob(f".{world.cache.name}.*"))


def go_on(world: World, workers: Workers = INLINE) -> set[str]:
    """Run the same command again: only what is not finished is computed. Returns what was."""
    kept = finished(world)
    assert compute(world, workers).computed_rows == SHARD_ROWS * (SHARDS - len(kept))
    return kept


if __name__ == "__main__":
    hardware.num_cores = lambda: 1  # as conftest.py has it for all tests
    with quick_processes():
        compute(World(Path(sys.argv[1])), local(int(sys.argv[2])) if int(sys.argv[2]) else INLINE)
