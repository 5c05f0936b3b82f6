"""Weights of the teacher in a cache: listed, checked, and version 3 only where there are some."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage import Cache
from storage.errors import ManifestInvalid, ShardCorrupt, ShardMissing, ShardUnexpected, SpecMismatch
from storage.seal import CarriedWeights, SealedParts, seal
from storage.verify import verify
from storage.writer import Store
from tests.storage.conftest import IDENTITY, fill
from tests.storage.test_refusals import read_all, rewrite


def write(directory: Path) -> None:
    (directory / "config.json").write_bytes(b"{}")
    (directory / "model.safetensors").write_bytes(b"some tensors")


@pytest.fixture
def carrying(tmp_path: Path) -> Cache:
    shards = fill(Store(tmp_path / "store"))
    carried = CarriedWeights((3, 0), write)
    seal(tmp_path / "toy", SealedParts(IDENTITY, shards, {"tokenizer.json": b"{}"}, {}, weights=carried))
    return Cache.open(tmp_path / "toy")


def test_weights_lie_in_the_cache_with_their_layers_and_make_it_version_3(carrying: Cache) -> None:
    assert carrying.weights_layers == (3, 0)
    assert (carrying.weights_dir / "model.safetensors").read_bytes() == b"some tensors"
    assert carrying.manifest.format_version == 3
    assert verify(carrying).files == len(carrying.manifest.files)
    paths = [file.path for file in carrying.manifest.files]
    assert paths[-2:] == ["weights/config.json", "weights/model.safetensors"]


def test_a_cache_without_weights_says_what_to_put_into_params_yaml(cache: Cache) -> None:
    assert cache.weights_layers == ()
    assert cache.manifest.format_version == 1
    with pytest.raises(SpecMismatch, match="carries no weights of its teacher") as refused:
        _ = cache.weights_dir
    assert "Write weights: {layers: [...]} under caches.toy in params.yaml" in str(refused.value)


def test_sealing_with_other_weights_links_the_same_shards(carrying: Cache, tmp_path: Path) -> None:
    before = [shard.key for shard in carrying.shards]
    sealed = seal(carrying.path, SealedParts(IDENTITY, Store(tmp_path / "store").finished(IDENTITY), {}, {}))
    assert [shard.key for shard in sealed.shards] == before
    assert not (carrying.path / "weights").exists()


def test_a_damaged_missing_or_stray_file_of_weights_is_refused(carrying: Cache) -> None:
    path = carrying.path / "weights" / "model.safetensors"
    path.write_bytes(b"other tensor")
    with pytest.raises(ShardCorrupt, match=r"model\.safetensors is damaged"):
        _ = carrying.weights_dir
    with pytest.raises(ShardCorrupt, match=r"model\.safetensors is damaged"):
        read_all(carrying.path)
    path.unlink()
    with pytest.raises(ShardMissing, match=r"model\.safetensors"):
        Cache.open(carrying.path)
    write(path.parent)
    (path.parent / "more").write_bytes(b"x")
    with pytest.raises(ShardUnexpected, match="weights/more"):
        read_all(carrying.path)
    shutil.rmtree(path.parent)
    with pytest.raises(ShardMissing, match=r"config\.json"):
        Cache.open(carrying.path)


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the manifest's `weights`."""
    return lambda body: body["weights"].update(changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(layers=[]), "weights.layers"),
        (changed(layers=[-1]), "weights.layers"),
        (changed(files=[]), "files are not weights/config.json and weights/model.safetensors"),
        (lambda body: body["weights"]["files"].reverse(), "files are not weights/config.json"),
        (
            lambda body: body["weights"]["files"][0].update(path="logits/x"),
            "files are not weights/config.json",
        ),
        (lambda body: body.update(format_version=1), "not that of its content"),
        (lambda body: body.pop("weights"), "not that of its content"),
        (lambda body: body.update(weights=None, format_version=1), "canonical"),
    ],
)
def test_a_manifest_that_lists_weights_in_another_way_is_refused(
    carrying: Cache, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    rewrite(carrying.path, change)
    with pytest.raises(ManifestInvalid, match=reason):
        Cache.open(carrying.path)
