"""Caches that cannot be averaged, mixtures that are damaged, and entries that name no mixture."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.caches import ThresholdTargets
from pipeline.config.load import load_params
from pipeline.data.inputs import read_inputs
from pipeline.data.rows import load_rows
from pipeline.losses.divergences import MixedTargets
from pipeline.streaming.rows import CachedRows
from pipeline.teachers.record import teacher_reader
from storage import Cache, manifest
from storage.errors import ConfigError, ManifestInvalid, ShardMissing, SpecMismatch
from storage.mixture import MIXTURE_NAME, mix, open_cache
from tests import toy
from tests.pipeline import row_worlds
from tests.pipeline.two_teachers import LABELS, NAMES, Two


def test_label_orders_that_differ_are_refused_by_name(two: Two, tmp_path: Path) -> None:
    own = two.copy(tmp_path / "own")
    first, second = (Cache.open(own.caches / name) for name in NAMES)
    turned = second.identity.spec.model_copy(update={"labels": LABELS[::-1]})
    second.manifest = second.manifest.model_copy(
        update={"identity": second.identity.model_copy(update={"spec": turned})}
    )
    with pytest.raises(
        SpecMismatch, match=r"caches\.second cannot be averaged with caches\.first"
    ) as refused:
        mix(own.caches / "other", {"first": (first, 1.0), "second": (second, 1.0)}, "error")
    assert "[positive, negative]   [negative, positive]" in str(refused.value)
    assert not (own.caches / "other").exists()


def test_only_dense_caches_can_be_averaged(two: Two, tmp_path: Path) -> None:
    own = two.copy(tmp_path / "own")
    own.teach("sparse", 3, targets=ThresholdTargets(codec="threshold", layout="plain"))
    with pytest.raises(SpecMismatch, match=r"spec\.codec\s+threshold\s+dense"):
        own.mix("other", ("first", "sparse"))


def test_only_answers_of_one_distribution_a_row_can_be_averaged(two: Two, tmp_path: Path) -> None:
    first, second = (Cache.open(two.caches / name) for name in NAMES)
    spec = second.identity.spec.model_copy(update={"task": "token-classification"})
    second.manifest = second.manifest.model_copy(
        update={"identity": second.identity.model_copy(update={"spec": spec})}
    )
    with pytest.raises(SpecMismatch, match=r"spec\.task\s+token-classification"):
        mix(tmp_path / "other", {"first": (first, 1.0), "second": (second, 1.0)}, "error")


def test_classifiers_of_images_are_averaged_too(tmp_path: Path) -> None:
    first = row_worlds.images(tmp_path).all_of_it()
    one, rows, reader = Cache.open(first.cache), load_rows(first.dataset), teacher_reader(first.teacher)
    first.make_teacher(train={**first.teaching["train"], "seed": 1})
    first.cache = tmp_path / "other"
    first.capture()
    both = mix(tmp_path / "both", {"one": (one, 3.0), "other": (Cache.open(first.cache), 1.0)}, "error")
    batches = [
        next(CachedRows(cache, rows, read_inputs(reader, rows), 0, ("train",)).in_order(8))
        for cache in (both, one, Cache.open(first.cache))
    ]
    mixed, *alone = (batch.teacher for batch in batches)
    assert isinstance(mixed, MixedTargets)
    shares = [torch.softmax(torch.as_tensor(logits), -1) for logits in alone]
    assert not torch.allclose(*shares)
    expected = 0.75 * shares[0] + 0.25 * shares[1]
    assert torch.softmax(torch.as_tensor(mixed.at(1.0)), -1).numpy() == pytest.approx(
        expected.numpy(), abs=1e-6
    )


def test_a_cache_that_was_not_verified_is_not_mixed(two: Two, tmp_path: Path) -> None:
    own = two.copy(tmp_path / "own")
    (own.records / "second.json").unlink()
    with pytest.raises(SpecMismatch, match="Verify it: dvc repro verify@second"):
        own.mix("other")
    (own.records / "both.json").write_text(json.dumps({"manifest": "0" * 64}))
    with pytest.raises(SpecMismatch, match="Verify it: dvc repro mix@both"):
        own.train(tmp_path / "out")


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda p: (p / MIXTURE_NAME).write_text("{"), ManifestInvalid, "mixture.json is not JSON"),
        (lambda p: edit(p, missing="guess"), ManifestInvalid, "missing"),
        (lambda p: edit(p, members=[]), ManifestInvalid, "members"),
        (lambda p: write_again(p), ManifestInvalid, "mixture.json .* canonical form"),
        (lambda p: edit(p, format_version=3), ManifestInvalid, "format_version"),
        (lambda p: edit(p, format_version=1), ManifestInvalid, "format_version"),
        (lambda p: shutil.copytree(p / "first", p / "second", dirs_exist_ok=True), SpecMismatch, "second"),
        (lambda p: (p / "second" / "tokenizer" / "tokenizer.json").unlink(), ShardMissing, "tokenizer.json"),
    ],
)
def test_damage_to_a_mixture_is_a_named_error(
    two: Two, tmp_path: Path, damage: Damage, error: type[Exception], said: str
) -> None:
    shutil.copytree(two.caches / "both", tmp_path / "both")
    damage(tmp_path / "both")
    with pytest.raises(error, match=said):
        open_cache(tmp_path / "both")


def write_again(path: Path) -> None:
    content = json.loads((path / MIXTURE_NAME).read_text())
    (path / MIXTURE_NAME).write_text(json.dumps(content))


def edit(path: Path, **fields: Any) -> None:
    """As a forger would: with a right checksum."""
    content = json.loads((path / MIXTURE_NAME).read_text()) | fields
    content.pop("checksum")
    (path / MIXTURE_NAME).write_bytes(manifest.checksummed(content))


def test_a_changed_weight_is_another_mixture(two: Two, tmp_path: Path) -> None:
    shutil.copytree(two.caches / "both", tmp_path / "both")
    before = open_cache(tmp_path / "both").manifest_sha256
    members = json.loads((tmp_path / "both" / MIXTURE_NAME).read_text())["members"]
    edit(tmp_path / "both", members=[members[0] | {"weight": 0.5}, members[1] | {"weight": 0.5}])
    assert open_cache(tmp_path / "both").manifest_sha256 != before


@pytest.mark.parametrize(
    ("mixtures", "said"),
    [
        ({"both": {"caches": ["toy", "tooy"]}}, "mixtures.both.caches: no 'tooy' in caches or mixtures; did"),
        ({"both": {"caches": ["toy", "toy"]}}, "'toy' is listed twice"),
        ({"both": {"caches": ["toy"]}}, "mixtures.both.caches"),
        ({"both": {"caches": ["toy", "more"], "weights": [1.0, 0.0]}}, "mixtures.both.weights"),
        ({"toy": {"caches": ["toy", "more"]}}, "mixtures.toy: caches has this name too"),
        (
            {"both": {"caches": ["toy", "again"]}, "again": {"caches": ["more", "both"]}},
            "mixtures.both.caches: the mixture contains itself, through again, both, more, toy",
        ),
        ({"both": {"caches": ["toy", "more"], "mising": "skip"}}, "unknown key; did you mean 'missing'"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_with_its_place(
    tmp_path: Path, mixtures: dict[str, Any], said: str
) -> None:
    shelves = copy.deepcopy(toy.params())
    shelves["caches"]["more"] = shelves["caches"]["toy"]
    toy.write_params(tmp_path, shelves | {"mixtures": mixtures})
    with pytest.raises(ConfigError) as refused:
        load_params(tmp_path / "params.yaml")
    assert said in str(refused.value)


def test_a_run_may_name_a_mixture_and_a_mixture_another_one(tmp_path: Path) -> None:
    shelves = copy.deepcopy(toy.params())
    shelves["caches"] |= {"more": shelves["caches"]["toy"], "most": shelves["caches"]["toy"]}
    shelves["mixtures"] = {"three": {"caches": ["both", "most"]}, "both": {"caches": ["toy", "more"]}}
    shelves["runs"]["fc-ce"]["cache"] = "three"
    toy.write_params(tmp_path, shelves)
    assert load_params(tmp_path / "params.yaml").runs["fc-ce"].cache == "three"
