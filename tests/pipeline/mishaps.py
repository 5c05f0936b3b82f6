"""What happens to captures: each function lets one happen to real processes, and ends with a sealed cache.

Each returns the names of the shards that were finished when it happened. Tests let each happen once,
benchmarks/bench_faults.py many times.
"""

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.capture import dask_cluster
from pipeline.config.params import Workers
from storage.disk import STALE_SECONDS
from storage.errors import StoreFull, WorkersLost
from tests import toy, warm
from tests.pipeline import crew
from tests.pipeline.conftest import World


def killed_workers(world: World, chance: random.Random, kills: int = 20) -> set[str]:
    """SIGKILL of random workers, `kills` times over one capture, each after another shard was finished."""
    kept: set[str] = set()

    def kill() -> None:
        for _ in range(kills):
            before, alive = len(crew.finished(world)), list[int]()
            while len(crew.finished(world)) <= before or not alive:
                time.sleep(0.005)
                alive = crew.processes()
            kept.update(crew.finished(world))
            crew.send(signal.SIGKILL, chance.choice(alive))

    with crew.meanwhile(kill):
        crew.compute(world, crew.local(2))
    return kept


def killed_driver(world: World, chance: random.Random) -> set[str]:
    """SIGKILL of the process that hands shards out. Its workers end with it."""
    with crew.driver(world, 2) as running:
        _under_way(world, chance)
        workers = crew.processes(running.pid)
        running.kill()
    crew.wait_for(lambda: all(map(crew.has_ended, workers)))
    return crew.go_on(world, crew.local(2))


def killed_scheduler(world: World, chance: random.Random) -> set[str]:
    """SIGKILL of a scheduler whose workers were started apart from it."""
    with started("dask_scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard") as scheduler:
        address = crew.address_of(scheduler)
        with started("dask_worker", address, "--nworkers=2", "--nthreads=1", "--no-dashboard"):

            def kill() -> None:
                _under_way(world, chance)
                scheduler.kill()

            with crew.meanwhile(kill), pytest.raises(WorkersLost, match="Finished shards are kept"):
                crew.compute(world, crew.local(2, capture=address))
    return crew.go_on(world)


def stalled_worker(world: World, chance: random.Random) -> set[str]:
    """SIGSTOP of a worker: it lives, and does not answer. It is late when the other one has done the rest."""
    kept: set[str] = set()
    up = threading.Event()

    def stop() -> None:
        _under_way(world, chance)
        kept.update(crew.finished(world))
        crew.send(signal.SIGSTOP, chance.choice(crew.processes()))
        crew.wait_for(lambda: len(crew.finished(world)) >= crew.SHARDS - 2)  # it holds two at most
        up.set()

    def clock() -> float:
        return time.monotonic() + (Workers().shard_timeout if up.is_set() else 0)

    with pytest.MonkeyPatch.context() as patched, crew.meanwhile(stop):
        patched.setattr(dask_cluster, "monotonic", clock)
        crew.compute(world, crew.local(2))
    return kept


def full_disk(world: World, chance: random.Random) -> set[str]:
    """The kernel refuses workers every file of more than a few bytes, as it does where a quota ends."""

    def fill() -> None:
        _under_way(world, chance)
        for pid in crew.processes():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, 100))

    with crew.meanwhile(fill), pytest.raises(StoreFull, match="no space left"):
        crew.compute(world, crew.local(2))
    return crew.go_on(world, crew.local(2))


def full_file_system(world: World, chance: random.Random) -> set[str]:
    """The store has a small file system of its own. Raises PermissionError where none may be mounted."""
    store = world.store.root
    store.mkdir()
    size = f"size={chance.randint(200, 800)}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(store)], check=False)
    if done.returncode:
        raise PermissionError("no file system may be mounted here")
    try:
        with pytest.raises(StoreFull, match="no space left"):
            crew.compute(world, crew.local(2))
        subprocess.run(["mount", "-o", "remount,size=64m", str(store)], check=True)
        return crew.go_on(world, crew.local(2))
    finally:
        subprocess.run(["cp", "-a", f"{store}/.", f"{store}.kept"], check=True)
        subprocess.run(["umount", str(store)], check=True)
        store.rmdir()
        os.rename(f"{store}.kept", store)


def two_captures(world: World, chance: random.Random) -> set[str]:
    """Another process captures the same cache: it began before, and goes on when this one has sealed."""
    with crew.driver(world, 0) as other:
        _under_way(world, chance)
        crew.send(signal.SIGSTOP, warm.served(other.pid))
        kept = crew.finished(world)
        crew.compute(world, crew.local(2))
        crew.send(signal.SIGCONT, warm.served(other.pid))
        output = other.communicate()[1].decode()
    assert other.returncode == 0, output
    return kept


def stale_files(world: World, chance: random.Random) -> set[str]:
    """Killed writers of this machine and of others left what they had begun."""
    host = socket.gethostname().replace(".", "-")
    temporary = world.store.root / "tmp"
    for place in (
        temporary / f"{host}.999999999.{chance.random()}",
        temporary / "elsewhere.1.old",
        world.cache.parent / f".{world.cache.name}.{host}.999999999",
    ):
        (place / "logits").mkdir(parents=True)
        (place / "logits" / "half.parquet").write_bytes(b"PAR1")
    (temporary / "nobody").write_bytes(b"half a file")
    for old in (temporary / "elsewhere.1.old", temporary / "nobody"):
        os.utime(old, times=(0, time.time() - STALE_SECONDS - 60))
    return crew.go_on(world)


def _under_way(world: World, chance: random.Random) -> None:
    """Wait until some shards are finished."""
    enough = chance.randint(3, 20)
    crew.wait_for(lambda: len(crew.finished(world)) >= enough)


# How many faults each is.
MISHAPS = {
    killed_workers: 20, killed_driver: 1, killed_scheduler: 1, stalled_worker: 1, full_disk: 1,
    two_captures: 1, stale_files: 1,
}  # fmt: skip


@contextlib.contextmanager
def started(program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program of Dask, with all that it starts; killed at the end."""
    command = [warm.python(), "-m", f"distributed.cli.{program}", *arguments]
    environment = os.environ | {"DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD": "forkserver"}
    running = subprocess.Popen(command, cwd=toy.ROOT, stderr=subprocess.PIPE, env=environment)
    try:
        yield running
    finally:
        killed = warm.kill(running.pid)
        running.communicate()
        crew.wait_for(lambda: all(map(crew.has_ended, killed)))
