"""CachedDataset over mixtures, images, labels and numbers; what does not fit is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.recipes import Recipe
from pipeline.data.rows import load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.losses.divergences import MixedTargets
from pipeline.objectives.loss import DistillationLoss
from pipeline.streaming import documents, rows
from pipeline.streaming.dataset import CachedDataset
from storage import Cache
from storage.errors import ConfigError, DataError, SpecMismatch
from tests.pipeline import row_worlds
from tests.pipeline.conftest import World
from tests.pipeline.objectives.test_loss import check_same
from tests.pipeline.prose import Prose
from tests.pipeline.streaming.test_dataset import same, stream_of
from tests.pipeline.two_teachers import Two


@pytest.fixture(autouse=True)
def _several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SHARDS_PER_WINDOW", 2)
    monkeypatch.setattr(documents, "SHARDS_PER_WINDOW", 2)


def test_a_mixture_gives_the_logits_of_every_teacher(two: Two) -> None:
    data = CachedDataset(two.caches / "both", two.dataset, batch_size=16)
    run = stream_of({"cache": two.caches / "both", "rows": two.dataset})
    for plain, batch in zip(data, run.epoch(0, 0, 16), strict=True):
        assert isinstance(batch.teacher, MixedTargets)
        assert torch.equal(plain["targets"]["logits"], batch.teacher.logits)
        assert plain["targets"]["teacher_weights"].tolist() == [0.75, 0.25]


def test_the_loss_of_a_mixture_is_that_of_a_run(two: Two) -> None:
    recipe = Recipe(alpha=0.25, temperature=2.0, batch_rows=16, pool=True)
    check_same(two.caches / "both", two.dataset, recipe, DistillationLoss(0.25, 2.0))


def test_images_are_read_as_the_teacher_reads_them(tmp_path: Path) -> None:
    world = row_worlds.images(tmp_path).all_of_it()
    data = CachedDataset(world.cache, world.dataset, batch_size=8)
    pixels = torch.tensor(load_rows(world.dataset).pixels)
    seen = 0
    for batch in data:
        assert batch["pixel_values"].shape[1:] == (1, 4, 4)
        assert {*batch} == {"pixel_values", "labels", "targets"}
        for image in batch["pixel_values"].flatten(1):
            seen += int(((image * 255).round() == pixels).all(1).sum())
    assert seen == len(load_rows(world.dataset).select("train"))


def test_several_labels_and_numbers_are_floats(tmp_path: Path) -> None:
    world = row_worlds.several(tmp_path).all_of_it()
    for batch in CachedDataset(world.cache, world.dataset):
        assert batch["labels"].dtype == torch.float32
        assert batch["labels"].shape == batch["targets"]["logits"].shape


def test_a_cache_that_is_open_and_one_of_strings_are_read_alike(world: World) -> None:
    data = CachedDataset(Cache.open(world.cache), world.dataset)
    assert same(data, CachedDataset(str(world.cache), str(world.dataset)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "trian"}, "split: 'trian', expected train, validation, test or pool"),
        ({"split": "test", "pool": True}, "pool and views are added to the split train"),
        ({"batch_tokens": 64}, "has one target a row: write batch_size instead of batch_tokens"),
        ({"batch_size": 0}, "batch_size: 0, expected 1 or more"),
        ({"epochs": 0}, "epochs: 0, expected 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(world: World, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CachedDataset(world.cache, world.dataset, **changes)


def test_rows_a_batch_are_refused_where_tokens_are_meant(prose: Prose) -> None:
    with pytest.raises(
        ConfigError, match="a target for each token: write batch_tokens instead of batch_size"
    ):
        CachedDataset(prose.cache, prose.dataset, batch_size=8)


def test_a_split_without_rows_is_refused(prose: Prose) -> None:
    with pytest.raises(DataError, match="has no rows of the split pool"):
        CachedDataset(prose.cache, prose.dataset, split="pool")


def test_a_cache_that_was_not_verified_is_refused_where_the_record_is_named(
    world: World, tmp_path: Path
) -> None:
    assert len(CachedDataset(world.cache, world.dataset, verified=world.verified))
    with pytest.raises(SpecMismatch, match="is not the cache that was verified"):
        CachedDataset(world.cache, world.dataset, verified=tmp_path / "none.json")


def test_a_cache_of_other_rows_is_refused(world: World, prose: Prose) -> None:
    with pytest.raises(SpecMismatch, match="rows without one"):
        CachedDataset(prose.cache, world.dataset, batch_tokens=64)


def test_hidden_states_that_the_cache_lacks_are_refused(world: World) -> None:
    with pytest.raises(SpecMismatch, match=r"layer\.7"):
        CachedDataset(world.cache, world.dataset, hidden=("layer.7",))


def test_a_language_model_with_another_tokenizer_is_refused(prose: Prose, tmp_path: Path) -> None:
    same_files = CachedDataset(prose.cache, prose.dataset, tokenizer=prose.root / "model")
    assert same(same_files, CachedDataset(prose.cache, prose.dataset))
    TextReader.learn(["other words"], 30, tmp_path, 128)
    with pytest.raises(SpecMismatch, match=r"(?s)does not fit the tokenizer.*tokenizer\.content"):
        CachedDataset(prose.cache, prose.dataset, tokenizer=tmp_path)


def test_a_student_may_read_rows_with_a_tokenizer_of_its_own(world: World, tmp_path: Path) -> None:
    own = world.rows()
    reader = TextReader.learn(own.texts.to_pylist(), 60, tmp_path / "tokenizer", 128)
    data = CachedDataset(world.cache, world.dataset, tokenizer=tmp_path / "tokenizer", max_length=4)
    assert max(batch["input_ids"].shape[1] for batch in data) == 4
    assert max(int(batch["input_ids"].max()) for batch in data) < reader.num_ids


def test_a_cache_that_no_student_learns_from_is_refused(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "golden" / "positions-v3" / "tags"
    shutil.copytree(golden, tmp_path / "tags")
    with pytest.raises((SpecMismatch, DataError)):
        CachedDataset(tmp_path / "tags", tmp_path)
