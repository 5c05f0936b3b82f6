"""What one of several tasks learns from, by digest; what is refused before a run of them starts."""

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.config.params import Multitask, Run, Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent
from pipeline.runtime import hardware
from pipeline.streaming.verified import DATASET_FILES, pin_task_inputs
from pipeline.training.multitask_run import train_multitask
from storage import Cache
from storage.errors import ConfigError, DataError, SpecMismatch
from tests.pipeline.conftest import World

TASK = Run(dataset="toy", cache="toy", student="fc", recipe="kd")


def test_a_task_is_pinned_to_the_bytes_of_its_cache_and_dataset_and_to_its_recipe(world: World) -> None:
    recipe = Recipe(alpha=0.3)
    found = pin_task_inputs("mood", TASK, recipe, world.run_paths(Path("model")))
    digests = {
        file: hashlib.sha256((world.dataset / file).read_bytes()).hexdigest() for file in DATASET_FILES
    }
    assert found["cache"] == {"name": "toy", "manifest": Cache.open(world.cache).manifest_sha256}
    assert found["dataset"] == {"name": "toy", **digests}
    assert found["recipe"] == {"name": "kd", **recipe.model_dump(mode="json")}
    json.dumps(found)


@pytest.mark.parametrize("file", DATASET_FILES)
def test_a_task_without_its_dataset_is_refused(world: World, tmp_path: Path, file: str) -> None:
    own = world.copy(tmp_path / "own")
    (own.dataset / file).unlink()
    with pytest.raises(DataError, match=r"tasks\.mood: there is no prepared dataset in .*\n.*prepare@toy"):
        pin_task_inputs("mood", TASK, Recipe(), own.run_paths(Path("model")))


def test_a_task_whose_cache_was_not_verified_is_refused(world: World, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "own")
    own.verified.write_text('{"manifest": "another"}')
    with pytest.raises(SpecMismatch, match="not the cache that was verified"):
        pin_task_inputs("mood", TASK, Recipe(), own.run_paths(Path("model")))


def test_several_processes_for_several_tasks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "ranks", lambda: (0, 2))
    entry = Multitask(student="fc", weights={"mood": 1.0, "sense": 1.0})
    with pytest.raises(ConfigError, match=r"multitask\.both: found 2 processes, expected one"):
        train_multitask("both", entry, FCStudent(kind="fc"), {}, Workers(), tmp_path / "both")
    assert not (tmp_path / "both").exists()
