"""A toy project taken through prepare, teacher, cache and verify once, for all tests of this room.

Tests read it; those that change something work on copies of their own.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from accelerate.state import AcceleratorState

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.verify import verify_cache
from pipeline.config.caches import CacheEntry
from pipeline.config.load import load_params
from pipeline.config.params import Params, RunInputs
from pipeline.data.prepare import prepare_dataset
from pipeline.data.rows import Rows, load_rows
from pipeline.runtime import hardware
from pipeline.teachers.prepare import prepare_teacher
from storage import Cache
from storage.writer import Store
from tests import shared, toy
from tests.pipeline.prose import Prose


class World(NamedTuple):
    """A project directory and its content."""

    root: Path

    @property
    def params(self) -> Params:
        return load_params(self.root / "params.yaml")

    @property
    def dataset(self) -> Path:
        return self.root / "data"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def store(self) -> Store:
        return Store(self.root / "store")

    @property
    def verified(self) -> Path:
        return self.root / "verified.json"

    def rows(self) -> Rows:
        return load_rows(self.dataset)

    def prepare(self) -> dict[str, Any]:
        return prepare_dataset("toy", self.params.datasets["toy"], self.dataset)

    def make_teacher(self) -> dict[str, Any]:
        return prepare_teacher("tiny", self.params.teachers["tiny"], self.dataset, self.teacher)

    def job(self, **changes: Any) -> CaptureJob:
        """The capture of its cache; `changes` are to the entry of params.yaml."""
        entry = self.entry(**changes)
        return CaptureJob("toy", entry, self.dataset, self.teacher, self.cache, self.store)

    def capture(self, **changes: Any) -> Captured:
        """Seal the cache; `changes` are to its entry of params.yaml."""
        return capture_cache(self.job(**changes))

    def entry(self, **changes: Any) -> CacheEntry:
        return self.params.caches["toy"].model_copy(update={"precision": "float32", **changes})

    def check(self) -> dict[str, Any]:
        return verify_cache("toy", Cache.open(self.cache), self.entry(), self.dataset, self.teacher)

    def run_paths(self, out: Path) -> RunInputs:
        return RunInputs(self.cache, self.dataset, self.verified, out)

    def copy(self, to: Path) -> "World":
        """The same project somewhere else, to be changed."""
        shutil.copytree(self.root, to)
        params = to / "params.yaml"
        params.write_text(params.read_text().replace(str(self.root), str(to)))
        return World(to)


@pytest.fixture(scope="session", autouse=True)
def _one_core() -> Iterator[None]:
    """Small tensors are done sooner by one thread, and tests run a process a core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "num_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def warm_processes(warm_python: dict[str, str]) -> Iterator[None]:
    """Programs that tests of this file start have their libraries imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in warm_python.items():
            patch.setenv(name, value)
        yield


def make(root: Path) -> World:
    """A project in `root`, captured and verified."""
    made = World(root)
    root.mkdir(parents=True, exist_ok=True)
    toy.write_csv(made.root / "reviews.csv")
    toy.write_model(made.root / "model")
    sections = toy.params()
    sections["datasets"]["toy"]["path"] = str(made.root / "reviews.csv")
    sections["teachers"]["tiny"]["model"] = str(made.root / "model")
    toy.write_params(made.root, sections)
    made.prepare()
    made.make_teacher()
    made.capture()
    made.verified.write_text(json.dumps(made.check()))
    return made


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(shared.once(tmp_path_factory, "world", make))


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Prose:
    """Documents with their cache; files whose tests change it have a fixture of this name that copies it."""

    def make(root: Path) -> None:
        made = Prose(root)
        made.make_teacher()
        made.capture()

    return Prose.at(shared.once(tmp_path_factory, "prose", make))


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> None:
    """What a stage finds in a new process: accelerate has no precision yet. One thread, for small tensors."""
    AcceleratorState._reset_state(reset_partial_state=True)
    hardware.pin_threads(1)
