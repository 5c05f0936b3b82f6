"""How shards are handed to real worker processes, counted, and named when they fail."""

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
import torch
from distributed import Client, LocalCluster
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.capture import dask_cluster
from pipeline.capture.dask_cluster import _client, worker_environments
from pipeline.capture.worker import Indices, ShardResult, WorkerJob
from pipeline.config.params import Workers
from pipeline.runtime import hardware
from storage.errors import ConfigError, ShardsFailed, ShardUnwritten, WorkersLost
from tests import warm
from tests.pipeline import crew, mishaps
from tests.pipeline.conftest import World

pytestmark = pytest.mark.usefixtures("warm_processes")
QUIET = {"host": "127.0.0.1", "dashboard_address": None, "silence_logs": logging.ERROR, "memory_limit": None}


@pytest.fixture(autouse=True)
def _quick_processes() -> Iterator[None]:
    with crew.quick_processes():
        yield


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """The toy project with nothing captured."""
    made = world.copy(tmp_path / "own")
    crew.forget(made)
    return made


def add_a_zebra(own: World) -> None:
    """One row more: it has a word that no other has."""
    with (own.root / "reviews.csv").open("a") as file:
        file.write("a zebra,1,pool\n")
    own.prepare()


def break_weights(own: World, name: str, row: int) -> None:
    """The teacher's outputs are NaN where they depend on this row of a tensor."""
    path = own.teacher / "model.safetensors"
    tensors = load_file(path)
    tensors[name][row] = float("nan")
    path.unlink()  # it is a link to the model's
    save_file(tensors, path, {"format": "pt"})


def test_a_shard_that_keeps_failing_is_named_when_all_others_are_finished(own: World) -> None:
    add_a_zebra(own)
    break_weights(own, "bert.embeddings.word_embeddings.weight", 1)  # what is read where a word is unknown
    with pytest.raises(ShardsFailed) as refused:
        crew.compute(own, crew.local(2))
    message = str(refused.value)
    assert "1 of 46 shards failed 3 times, all others are finished" in message
    assert re.search(
        r"shard [0-9a-f]{12} \(4 rows, [0-9a-f]{32} to [0-9a-f]{32}\): TeacherError: the teacher's", message
    )
    assert "are not finite" in message
    assert "It happened on " in message
    assert len(crew.finished(own)) == 45


def test_a_capture_where_nothing_works_ends_soon(own: World) -> None:
    break_weights(own, "classifier.bias", 0)
    with pytest.raises(ShardsFailed, match="20 shards failed one after the other") as refused:
        crew.compute(own, crew.local(2))
    assert "are not finite" in str(refused.value)
    assert not crew.finished(own)


def test_a_shard_that_kills_its_workers_is_named_and_all_others_are_finished(own: World) -> None:
    add_a_zebra(own)
    deadly = {"distributed.worker.preload": ["tests.pipeline.deadly"]}
    with dask.config.set(deadly | {"distributed.scheduler.allowed-failures": 0}):
        with pytest.raises(
            ShardsFailed, match=r"4 rows, \w+ to \w+\): 1 workers died while they computed it"
        ) as refused:
            crew.compute(own, crew.local(2))
    assert "1 of 46 shards failed 3 times" in str(refused.value)
    assert len(crew.finished(own)) == crew.SHARDS


def test_workers_that_are_killed_while_they_start_are_replaced(own: World) -> None:
    killed: list[int] = []

    def kill() -> None:
        crew.wait_for(lambda: len(crew.finished(own)) > 5)
        while len(killed) < 6:  # both workers, and the next four as soon as there are such
            for pid in set(crew.processes()) - set(killed):
                crew.send(signal.SIGKILL, pid)
                killed.append(pid)

    with crew.meanwhile(kill):
        crew.compute(own, crew.local(2))
    assert len(crew.finished(own)) == crew.SHARDS


def test_a_stalled_worker_without_a_nanny_is_retired(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    late = threading.Event()
    monkeypatch.setattr(dask_cluster, "monotonic", lambda: time.monotonic() + 9999 * late.is_set())
    with LocalCluster(n_workers=1, threads_per_worker=1, **QUIET) as group, Client(group) as watching:
        arguments = (group.scheduler_address, "--no-nanny", "--nthreads=1", "--no-dashboard")
        with mishaps.started("dask_worker", *arguments) as other:
            watching.wait_for_workers(2)

            def stop() -> None:
                crew.wait_for(lambda: len(crew.finished(own)) > 5)
                crew.send(signal.SIGSTOP, warm.served(other.pid))
                crew.wait_for(lambda: len(crew.finished(own)) >= crew.SHARDS - 2)
                late.set()

            with crew.meanwhile(stop):
                crew.compute(own, Workers(capture=group.scheduler_address, threads=1))
            assert len(watching.nthreads()) == 1
    assert len(crew.finished(own)) == crew.SHARDS


def test_a_missing_scheduler_is_an_error_that_names_it(own: World) -> None:
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(WorkersLost, match="a scheduler with workers cannot be reached: OSError"):
            crew.compute(own, Workers(capture="tcp://127.0.0.1:9", threads=1))


def test_a_scheduler_without_workers_is_not_waited_for_without_end(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "WAIT_FOR_WORKERS", 0.1)
    with LocalCluster(n_workers=0, **QUIET) as group:
        with pytest.raises(WorkersLost, match="cannot be reached: WorkerStartTimeoutError: Only 0/1 workers"):
            crew.compute(own, Workers(capture=group.scheduler_address, threads=1))


def write_elsewhere(job: WorkerJob, key: str, rows: Indices) -> ShardResult:
    """What a worker does whose machine has another directory of this name."""
    return ShardResult(key=key, computed=True)


def test_a_store_that_machines_do_not_share_is_an_error(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "compute_shard", write_elsewhere)
    with pytest.raises(ShardUnwritten, match="Expected a store that all machines share"):
        crew.compute(own, crew.local(1))


def test_workers_have_their_threads_and_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "gpus", lambda: ["0", "GPU-5f", "2"])
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # Dask keeps variables of the environment, and adds to them
    with _client(Workers(capture="local", gpus=2), 7) as client:
        found = client.run(lambda: [os.environ[name] for name in names])
    assert sorted(found.values()) == [["7", "7", "0"], ["7", "7", "GPU-5f"]]


@pytest.mark.parametrize(
    ("workers", "devices", "expected"),
    [
        ({}, ["0", "1"], ["0", "1"]),
        ({"gpus": 1}, ["0", "1"], ["0"]),
        ({"processes": 3}, ["0", "1"], ["0", "1", "0"]),
        ({}, [], [""]),
        ({"threads": 2}, [], ["", "", "", ""]),
        ({"threads": 16}, [], [""]),
        ({"gpus": 0, "threads": 4}, ["0", "1"], ["", ""]),
        ({"threads": 1, "processes": 3}, [], ["", "", ""]),
    ],
)
def test_there_is_a_process_a_gpu_or_so_many_as_fit(
    workers: dict[str, int], devices: list[str], expected: list[str]
) -> None:
    found = worker_environments(Workers(capture="local", **workers), devices, 8, workers.get("threads", 8))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == expected


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"workers\.gpus: 3 are wanted, and 2 are visible"):
        worker_environments(Workers(capture="local", gpus=3), ["0", "1"], 8, 8)


def test_threads_are_not_guessed_from_the_number_of_processes() -> None:
    with pytest.raises(ConfigError, match=r"Write workers\.threads too, for example 2"):
        worker_environments(Workers(capture="local", processes=4), [], 8, 8)


def test_gpus_are_called_what_the_environment_calls_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert hardware.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f,7")
    assert hardware.gpus() == ["GPU-5f", "7"]


def test_workers_without_dask_are_refused_with_what_to_install(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("pipeline.capture.dask_cluster")
    monkeypatch.delitem(sys.modules, "pipeline.capture.dask_cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"needs Dask, and distributed is not installed"):
        crew.compute(own, crew.local(2))


@pytest.mark.parametrize("capture_on", ["lokal", "10.0.0.1:8786", "tcp://"])
def test_an_invalid_place_to_capture_is_refused(capture_on: str) -> None:
    with pytest.raises(ValidationError, match="capture"):
        Workers(capture=capture_on)
