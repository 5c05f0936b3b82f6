"""Pooled hidden states of teachers with several labels, numbers or vectors a row: kept and learned from."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.capture.identity import capture_identity
from pipeline.config.caches import CacheEntry
from pipeline.config.recipes import Recipe
from pipeline.config.students import TinyBERTStudent
from pipeline.data.rows import load_rows
from pipeline.engines.loading import load_classifier
from pipeline.teachers.record import reading_spec, teacher_reader
from pipeline.training.checks import check_run
from pipeline.training.job import Job
from pipeline.training.run import write_student_tokenizer
from pipeline.training.seed import train_seed
from storage import Cache
from storage.errors import TeacherError
from tests import toy
from tests.pipeline import row_worlds
from tests.pipeline.row_worlds import World

MAKERS: dict[str, Callable[[Path], World]] = {
    "several": row_worlds.several, "numbers": row_worlds.numbers,
    "vectors": lambda root: row_worlds.vectors(root, embedding={"pool": "mean", "normalised": True}),
}  # fmt: skip
DIVERGENCES = {"several": "forward", "numbers": "mse", "vectors": "cosine"}
LAYER = 1


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Projects with pooled states, verified."""
    made = {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}
    for world in made.values():
        world.hidden = {"layers": [LAYER, toy.LAYERS], "pool": "mean", "dtype": "float32"}
        world.all_of_it()
    return made


@pytest.mark.parametrize("name", MAKERS)
def test_pooled_states_are_the_means_of_the_live_teachers(worlds: dict[str, World], name: str) -> None:
    world = worlds[name]
    cache, rows, reader = Cache.open(world.cache), load_rows(world.dataset), teacher_reader(world.teacher)
    spec = cache.identity.spec
    reading = reading_spec(world.teacher)
    model = load_classifier(world.teacher, task=spec.task, reading=reading, pad_token_id=reader.pad_id).cpu()
    shard = cache.shards[0]
    kept, row_ids = cache.hidden(shard, f"layer.{LAYER}"), rows.row_ids.to_pylist()
    for state, row_id in zip(kept[:5], cache.read(shard).row_ids.to_pylist()[:5], strict=True):
        tokens = reader.read([rows.texts[row_ids.index(row_id)].as_py()], [row_id])
        with torch.inference_mode():
            ids = torch.from_numpy(tokens.ids.astype(np.int64))[None]
            live = getattr(model, "model", model)(input_ids=ids, output_hidden_states=True)
        assert np.allclose(state, live.hidden_states[LAYER][0].mean(0).numpy(), atol=1e-5)


@pytest.mark.parametrize("prediction", [0.0, 1.0])
@pytest.mark.parametrize("name", MAKERS)
def test_a_student_is_matched_with_them(
    worlds: dict[str, World], name: str, prediction: float, tmp_path: Path
) -> None:
    world = worlds[name]
    cache, rows, paths = Cache.open(world.cache), load_rows(world.dataset), world.paths(tmp_path / "model")
    student = TinyBERTStudent(kind="tinybert", layers=1, width=8, heads=2)
    body = {"alpha": 0.0, "epochs": 1, "batch_rows": 16, "divergence": DIVERGENCES[name]}
    recipe = Recipe.model_validate({**body, "match": {"prediction": prediction, "states": {}}})
    check_run("run", cache, rows, student, recipe, paths.verified)
    write_student_tokenizer(student, cache, rows, paths.out / "tokenizer")
    done = train_seed(Job(0, 1, student, recipe, paths))
    assert math.isfinite(done.fit.best_loss)
    assert -1 <= done.fit.best_accuracy <= 1 or name == "numbers"  # R2 has no lower bound
    assert done.by_loss == (prediction == 0 or name != "several")


def test_states_of_images_are_refused(tmp_path: Path) -> None:
    world = row_worlds.images(tmp_path)
    world.prepare()
    world.make_teacher()
    entry = {"dataset": "toy", "teacher": "tiny", "hidden": {"layers": [1]}}
    with pytest.raises(TeacherError, match="states of image-classification cannot be kept"):
        capture_identity(CacheEntry.model_validate(entry), world.teacher)
