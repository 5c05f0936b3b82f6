"""Kill -9 at any moment of `cache`, then `dvc repro`: what is finished stays, the bytes are the same."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import warm
from tests.stages.conftest import Project

# Appended to the code of the test's own project: shards and seals then take long enough to be interrupted.
SLOW_SHARDS = """
_put = Store.put
def put(self, *arguments, **options):
    import time
    time.sleep(0.6)
    return _put(self, *arguments, **options)
Store.put = put
"""
SLOW_WRITES = """
_fsync_tree_now = fsync_tree
def fsync_tree(root):
    import time
    time.sleep(0.4)
    _fsync_tree_now(root)
    time.sleep(0.4)
"""


def kill_when(project: Project, moment: Callable[[], bool]) -> None:
    """Start `dvc repro cache@toy` and kill it at that moment, with all that it started."""
    command = ["dvc", "repro", "cache@toy"]
    with subprocess.Popen(
        command, cwd=project.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as running:
        deadline = time.monotonic() + 300
        while not moment():
            assert running.poll() is None, (
                f"it ended before the moment came: {running.stdout.read().decode()}"
            )
            assert time.monotonic() < deadline
            time.sleep(0.02)
        warm.kill(running.pid)


@pytest.fixture
def interrupted(project: Project) -> Project:
    """The finished project without its cache and its shards: capturing is all that is left to do, slowly."""
    project.run("rm", "-rf", ".stillroom", ".dvc/cache/runs", "caches")
    for name, code in (("storage/writer.py", SLOW_SHARDS), ("storage/disk.py", SLOW_WRITES)):
        with (project.root / name).open("a") as file:
            file.write(code)
    yaml, lock = YAML(), project.root / "dvc.lock"
    record = yaml.load(lock.read_text())
    del record["stages"]["cache@toy"]
    yaml.dump(record, lock)
    return project


def test_kill_9_at_several_moments_of_one_capture_loses_nothing(
    interrupted: Project, finished: Project
) -> None:
    project = interrupted
    temporary = project.root / ".stillroom" / "tmp"
    first = lambda: len(project.shards()) >= 1 and any(temporary.iterdir())  # noqa: E731 - while a shard is written
    kill_when(project, first)
    kept = project.shards()
    assert 1 <= len(kept) < 6
    kill_when(project, lambda: len(project.shards()) >= 4)
    more = project.shards()
    assert {path: more[path] for path in kept} == kept
    sealing = lambda: any(Path(project.root / "caches").glob(".toy.*"))  # noqa: E731
    kill_when(project, sealing)
    assert not (project.root / "caches" / "toy").exists()
    complete = project.shards()
    assert {path: complete[path] for path in more} == more

    done = project.repro("cache@toy")
    assert "180 of 180 rows are captured already" in done.output
    assert project.shards() == complete
    assert project.files("caches/toy") == finished.files("caches/toy")
    assert not list(temporary.iterdir())
    assert not sealing()
