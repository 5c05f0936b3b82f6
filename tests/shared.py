"""What the processes of one test run share: the first one that needs a thing makes it, under a lock."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def directory(factory: pytest.TempPathFactory) -> Path:
    """The temporary directory of this test run, the same one in all processes that run its tests."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that `make` fills once in a test run. Tests that change something work on copies of it."""
    root = directory(factory) / name
    done = root.with_name(f"{name}.done")
    with root.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
            make(root)
            done.touch()
    return root
