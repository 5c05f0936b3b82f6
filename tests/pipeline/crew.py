"""Captures by real worker processes, and what can happen to these. Used by tests and benchmarks."""

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dask
import psutil
from distributed.utils import get_mp_context

from pipeline import capture
from pipeline.config import Workers
from tests.pipeline.conftest import World

SHARD_ROWS = 6  # 30 shards of the toy's 180 rows
INLINE = Workers(threads=1)
PRELOAD = ["distributed", "transformers", "transformers.models.bert.modeling_bert", "pipeline.assignment"]


@contextlib.contextmanager
def quick_processes() -> Iterator[None]:
    """Within, worker processes are forked from one that has imported all that they need."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        context = get_mp_context()
        context.set_forkserver_preload(PRELOAD)
        yield


def local(processes: int, **changes: Any) -> Workers:
    """So many processes of this machine, one thread each."""
    return Workers(**{"capture": "local", "processes": processes, "threads": 1} | changes)


def compute(world: World, workers: Workers, **changes: Any) -> capture.Captured:
    """Capture in many small shards."""
    entry = world.entry(**{"shard_rows": SHARD_ROWS} | changes)
    return capture.capture(
        "toy", entry, world.dataset, world.teacher, world.cache, world.store, workers=workers
    )


def forget(world: World) -> None:
    """Nothing is captured any more."""
    for made in (world.cache, world.store.root):
        shutil.rmtree(made, ignore_errors=True)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def finished(world: World) -> dict[str, int]:
    """The finished shards of the store, and when each was written, in ns."""
    found = world.store.root.glob("[0-9a-f]*/*/shard.json")  # not those in tmp/
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def processes() -> list[psutil.Process]:
    """The worker processes that live now: children of what forks them."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [grandchild for grandchild in child.children() if grandchild.status() != "zombie"]
    return found
