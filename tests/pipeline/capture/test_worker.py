"""A worker's job and its work: here in this process, as it would be in another."""

import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.capture import dask_cluster, worker
from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.capture.shards import answer_and_write
from pipeline.capture.worker import PlannedShard, WorkerJob, compute_shard
from pipeline.config.caches import CacheEntry
from pipeline.config.params import Workers
from pipeline.engines import classifier
from pipeline.engines.loading import load_classifier
from storage.errors import SpecMismatch
from storage.writer import Store, StoredShard
from tests.pipeline import crew, row_worlds
from tests.pipeline.conftest import World
from tests.pipeline.encoders import Project
from tests.pipeline.prose import Prose


@pytest.fixture(autouse=True)
def _no_worker_any_more() -> Iterator[None]:
    yield
    worker._state = None


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """The toy project with nothing captured."""
    made = world.copy(tmp_path / "own")
    crew.forget(made)
    return made


Spread = Callable[[str, WorkerJob, Sequence[PlannedShard], Workers], list[StoredShard]]


def here(name: str, job: WorkerJob, shards: Sequence[PlannedShard], _: Workers) -> list[StoredShard]:
    """A worker in this process: its job is pickled, as on its way to another process."""
    found = []
    for shard in shards:
        received = pickle.loads(pickle.dumps((job, shard.key, shard.rows)))
        assert compute_shard(*received) == {"key": shard.key, "computed": True}
        stored = Store(job.store).shard(job.identity, shard.key)
        assert stored is not None
        found.append(stored)
    return found


@pytest.fixture
def assigned(own: World, monkeypatch: pytest.MonkeyPatch) -> tuple[WorkerJob, PlannedShard]:
    """The job of a worker, and the first shard of a capture that computes none."""
    received: list[Any] = []

    def keep(name: str, job: WorkerJob, shards: Sequence[PlannedShard], _: Workers) -> Any:
        received.append((job, shards[0]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dask_cluster, "compute_on_cluster", keep)
        with pytest.raises(KeyboardInterrupt):
            crew.compute(own, crew.local(2))
    (found,) = received
    return found


def test_a_worker_receives_and_returns_little(
    assigned: tuple[WorkerJob, PlannedShard],
) -> None:
    job, shard = assigned
    assert len(pickle.dumps((job, shard.key, shard.rows))) < 10_000
    assert compute_shard(job, shard.key, shard.rows) == {"key": shard.key, "computed": True}


def test_a_finished_shard_is_not_computed_again(
    assigned: tuple[WorkerJob, PlannedShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, shard = assigned
    compute_shard(job, shard.key, shard.rows)
    monkeypatch.setattr(worker, "WorkerState", None)
    assert compute_shard(job, shard.key, shard.rows) == {"key": shard.key, "computed": False}


def test_a_worker_loads_the_teacher_once(
    assigned: tuple[WorkerJob, PlannedShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, shard = assigned
    loads, load = [], load_classifier
    monkeypatch.setattr(
        classifier, "load_classifier", lambda *args, **named: loads.append(args) or load(*args, **named)
    )
    for _ in range(2):
        compute_shard(*pickle.loads(pickle.dumps((job, shard.key, shard.rows))))
        shutil.rmtree(job.store)
    assert len(loads) == 1


def test_a_worker_works_on_one_shard_at_a_time_whatever_threads_dask_gives_it(
    assigned: tuple[WorkerJob, PlannedShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, shard = assigned
    inside, most, answer = [0], [0], answer_and_write

    def watch(*arguments: Any, **named: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.2)
        inside[0] -= 1
        return answer(*arguments, **named)

    monkeypatch.setattr(worker, "answer_and_write", watch)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compute_shard, [job] * 2, [shard.key] * 2, [shard.rows] * 2))
    assert most == [1]


def test_a_worker_computes_with_the_threads_of_its_job(
    assigned: tuple[WorkerJob, PlannedShard],
) -> None:
    job, shard = assigned
    compute_shard(job._replace(threads=3), shard.key, shard.rows)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (
            lambda job: job._replace(identity=job.identity.model_copy(update={"capture_version": 99})),
            "identity",
        ),
        (lambda job: job._replace(rows="0" * 64), "rows"),
    ],
    ids=["teacher", "rows"],
)
def test_a_worker_that_sees_other_things_than_the_driver_is_refused(
    assigned: tuple[WorkerJob, PlannedShard],
    change: Callable[[WorkerJob], WorkerJob],
    field: str,
) -> None:
    job, shard = assigned
    with pytest.raises(SpecMismatch, match="does not see what was to be captured") as refused:
        compute_shard(change(job), shard.key, shard.rows)
    assert [fault.field for fault in refused.value.mismatches] == [field]
    assert not Store(job.store).finished(job.identity)


def test_rows_that_do_not_make_the_shard_that_was_meant_are_refused(
    assigned: tuple[WorkerJob, PlannedShard],
) -> None:
    job, shard = assigned
    with pytest.raises(SpecMismatch) as refused:
        compute_shard(job, shard.key, shard.rows + 1)
    assert [fault.field for fault in refused.value.mismatches] == ["shard"]


def test_a_shard_that_another_capture_finished_meanwhile_is_not_computed(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> None:
        crew.compute(own)
        monkeypatch.setattr(classifier, "infer_rows", None)

    entry = own.entry(shard_rows=crew.SHARD_ROWS)
    done = capture_cache(
        CaptureJob("toy", entry, own.dataset, own.teacher, own.cache, own.store, other, crew.INLINE)
    )
    assert done.manifest.num_rows == 180


def tagged(root: Path) -> tuple[Any, dict[str, Any]]:
    own = Project.start(root, "token-classification", 30)
    own.make_teacher()
    return own, {"hidden": {"layers": [2], "pool": "none", "pca": 4}}


def masked(root: Path) -> tuple[Any, dict[str, Any]]:
    own = Project.start(root, "masked-lm", 30)
    own.make_teacher()
    return own, {"targets": {"codec": "sample", "draws": 8}}


def prose(root: Path) -> tuple[Any, dict[str, Any]]:
    own = Prose(root)
    own.make_teacher()
    return own, {"targets": {"codec": "threshold", "tau": 0.1}, "hidden": {"layers": [1], "pool": "none"}}


def of_rows(root: Path, make: Callable[[Path], row_worlds.World]) -> tuple[Any, dict[str, Any]]:
    own = make(root)
    own.prepare()
    own.make_teacher()
    return own, {}


KINDS = {
    "tagged": tagged, "masked": masked, "prose": prose, "images": partial(of_rows, make=row_worlds.images),
    "vectors": partial(of_rows, make=partial(row_worlds.vectors, embedding={"pool": "mean"})),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_teacher_gives_workers_the_bytes_that_it_gives_inline(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "compute_on_cluster", here)
    own, changes = KINDS[kind](tmp_path)
    body = {"dataset": "toy", "teacher": "tiny", "precision": "float32", "shard_rows": 7, **changes}
    entry = CacheEntry.model_validate(body)
    for name, workers in (("inline", crew.INLINE), ("local", crew.local(2))):
        store = Store(tmp_path / name / "store")
        place = tmp_path / name / "cache"
        capture_cache(CaptureJob("toy", entry, own.dataset, own.teacher, place, store, workers=workers))
    found = crew.content(tmp_path / "inline" / "cache")
    assert len([path for path in found if path.startswith("logits/")]) > 3
    assert crew.content(tmp_path / "local" / "cache") == found
