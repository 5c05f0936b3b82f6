"""Two machines capture one cache through a bucket: what one has computed, the other never computes."""

from pathlib import Path

import pytest

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.engines import classifier
from storage.location import Url
from storage.shared_store import SharedStore
from tests.pipeline.capture.test_capture import content, no_teacher
from tests.pipeline.conftest import World
from tests.s3 import BUCKET, Server


def test_a_second_machine_seals_the_same_cache_without_the_teacher(
    world: World, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = Url(f"s3://{BUCKET}/{tmp_path.name}")

    def seal(machine: str) -> Captured:
        store, out = SharedStore(tmp_path / machine, url), tmp_path / f"cache-{machine}"
        return capture_cache(CaptureJob("toy", world.entry(), world.dataset, world.teacher, out, store))

    assert seal("one").computed_rows == 180
    monkeypatch.setattr(classifier, "load_classifier", no_teacher)
    assert seal("two").computed_rows == 0
    assert content(tmp_path / "cache-one") == content(tmp_path / "cache-two") == content(world.cache)
