"""A run over a cache on a bucket learns what it learns over the same cache on its own disk."""

from multiprocessing import forkserver
from pathlib import Path

import pytest

from pipeline.config.load import load_params
from pipeline.config.params import Params, RunInputs, Workers
from pipeline.streaming.verified import open_inputs
from pipeline.training.run import train_run
from storage import Cache
from storage.errors import ConfigError
from storage.location import Url
from storage.received import publish, receive
from tests import toy
from tests.pipeline.conftest import World
from tests.s3 import BUCKET, Server


def test_a_student_learns_the_same_from_a_bucket_within_a_small_limit(
    world: World, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forkserver._forkserver._stop()  # one that an earlier test started does not know where the bucket is
    url = Url(f"s3://{BUCKET}/{tmp_path.name}")
    far, params = tmp_path / "far", world.params
    receive(far, str(url), publish(world.cache, url).manifest_sha256)

    def trained(paths: RunInputs) -> list[dict[str, object]]:
        run = params.runs["fc-kd-pool"].model_copy(update={"seeds": (0, 1)})
        record = train_run(
            "toy", run, params.students["fc"], params.recipes["kd-pool"], paths, Workers(seeds_at_once=2)
        )
        return [seed["curve"] for seed in record["seeds"]]

    near = trained(world.run_paths(tmp_path / "near-model"))
    there = world.run_paths(tmp_path / "far-model")._replace(cache=far)
    shards = Cache.open(world.cache).shards
    files = [file.bytes for shard in shards for file in shard.files]
    assert trained(there._replace(local_bytes=sum(files) // 2)) == near
    kept = sum(file.stat().st_size for file in (tmp_path / ".stillroom/nearby").rglob("*") if file.is_file())
    assert kept <= sum(files) // 2
    with pytest.raises(ConfigError, match="1,000 bytes of local disk are too few"):
        open_inputs(there._replace(local_bytes=1000))
    forkserver._forkserver._stop()  # later tests have no bucket


FAR = {"url": "s3://bucket/caches/far", "manifest": "0" * 64}


def load(root: Path, **changes: object) -> Params:
    toy.write_params(root, toy.params(**changes))
    return load_params(root / "params.yaml")


def test_a_run_reads_a_received_cache_and_a_mixture_does_not(tmp_path: Path) -> None:
    run = toy.params()["runs"]["fc-ce"] | {"cache": "far"}
    assert load(tmp_path, received={"far": FAR}, runs={"far": run}).received["far"].url == FAR["url"]
    with pytest.raises(ConfigError, match=r"mixtures\.two\.caches: no 'far' in caches"):
        load(tmp_path, received={"far": FAR}, mixtures={"two": {"caches": ["toy", "far"]}})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"toy": FAR}, "'toy' is in received and in caches"),
        ({"far": FAR | {"url": "/some/where"}}, r"received\.far\.url"),
        ({"far": FAR | {"manifest": "0f7c"}}, r"received\.far\.manifest"),
    ],
    ids=range(3),
)
def test_entries_that_cannot_be_received_are_refused(tmp_path: Path, entry: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, received=entry)
