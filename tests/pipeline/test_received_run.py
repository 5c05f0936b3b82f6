"""A run over a cache on a bucket learns what it learns over the same cache on its own disk."""

from pathlib import Path

import pytest

from pipeline import runs
from storage import Cache
from storage.errors import ConfigError
from storage.location import Url
from storage.received import publish, receive
from tests.pipeline.conftest import World
from tests.s3 import BUCKET, Server


def test_a_student_learns_the_same_from_a_bucket_within_a_small_limit(
    world: World, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = Url(f"s3://{BUCKET}/{tmp_path.name}")
    far, params = tmp_path / "far", world.params
    receive(far, str(url), publish(world.cache, url).manifest_sha256)

    def trained(paths: runs.config.RunPaths) -> list[dict[str, object]]:
        run = params.runs["fc-kd-pool"].model_copy(update={"seeds": (0, 1)})
        record = runs.train("toy", run, params.students["fc"], params.recipes["kd-pool"], 2, paths)
        return [seed["curve"] for seed in record["seeds"]]

    near = trained(world.run_paths(tmp_path / "near-model"))
    there = world.run_paths(tmp_path / "far-model")._replace(cache=far)
    shards = Cache.open(world.cache).shards
    files = [file.bytes for shard in shards for file in shard.files]
    assert trained(there._replace(local_bytes=sum(files) // 2)) == near
    kept = sum(file.stat().st_size for file in (tmp_path / ".stillroom/nearby").rglob("*") if file.is_file())
    assert kept <= sum(files) // 2
    with pytest.raises(ConfigError, match="1,000 bytes of local disk are too few"):
        runs.open_inputs(there._replace(local_bytes=1000))
