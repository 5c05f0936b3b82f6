"""Decoded shards in a scratch file: the same batches, decoded once, and never a reason to fail."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.recipes import Recipe
from pipeline.config.students import LlamaStudent
from pipeline.data.rows import load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.losses.sparse import SparseTargets
from pipeline.streaming import documents
from pipeline.streaming.batch import DistillBatch, Stream
from pipeline.streaming.decoded_shards import DecodedShards
from pipeline.streaming.documents import CachedDocuments
from pipeline.students.registry import build_student
from pipeline.training.documents_workload import documents_workload
from pipeline.training.workload import TrainingData
from storage import Cache
from tests.pipeline.prose import Prose

A_SHARD = {"few": np.arange(5, dtype=np.int32), "table": np.eye(3), "none": np.zeros(0, np.float32)}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a shard is decoded."""
    calls: list[int] = []
    read = Cache.read
    monkeypatch.setattr(Cache, "read", lambda self, shard: calls.append(1) or read(self, shard))
    return calls


def documents_of(prose: Prose, num_bytes: int, readers: int = 1) -> CachedDocuments:
    stream = Stream(readers=readers, decoded_bytes=num_bytes)
    return CachedDocuments(
        Cache.open(prose.cache), load_rows(prose.dataset), ("train",), 9, stream=stream
    )  # fmt: skip


def tensors(batch: DistillBatch) -> list[torch.Tensor]:
    assert isinstance(batch.teacher, SparseTargets)
    return [*batch.inputs.values(), batch.labels_T, *batch.teacher, *batch.hidden.values()]


def same(first: list[DistillBatch], second: list[DistillBatch]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(
        a.dtype == b.dtype and torch.equal(a, b)
        for one, other in pairs
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


@pytest.mark.parametrize("readers", [0, 1, 3])
def test_later_epochs_decode_nothing_and_have_the_batches_that_decoding_gives(
    prose: Prose, readers: int, decoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "SHARDS_PER_WINDOW", 2)
    plain, kept = documents_of(prose, 0), documents_of(prose, 2**30, readers)
    for epoch in range(3):
        expected = list(plain.epoch(0, epoch, 40))
        decoded.clear()
        assert same(list(kept.epoch(0, epoch, 40)), expected)
        assert len(decoded) == (len(kept.cache.shards) if epoch == 0 else 0)
    assert same(list(kept.in_order(40)), list(plain.in_order(40)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], "the file has no name"


def test_what_finds_no_room_is_decoded_each_time(
    prose: Prose, decoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = documents_of(prose, 0)
    expected = list(plain.epoch(0, 1, 40))
    num, needed = len(plain.cache.shards), []
    for limit in (0, *(2**bits for bits in range(14, 22))):
        kept = documents_of(prose, limit)
        list(kept.epoch(0, 0, 40))
        decoded.clear()
        assert same(list(kept.epoch(0, 1, 40)), expected)
        needed.append(len(decoded))
    assert needed == sorted(needed, reverse=True)
    assert (needed[0], needed[-1]) == (num, 0)
    assert any(0 < some < num for some in needed), needed


def test_what_training_decoded_validation_finds(
    prose: Prose, decoded: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(alpha=0.0, batch_tokens=40)
    student = LlamaStudent(kind="llama", layers=1, width=16, heads=2, max_length=9)
    rows = load_rows(prose.dataset)
    data = TrainingData(Cache.open(prose.cache), rows, TextReader(prose.teacher, 9, "truncate"))
    lesson = documents_workload(recipe, data, 0, Stream(decoded_bytes=2**30))
    list(lesson.batches(0))
    decoded.clear()
    model = build_student(student, lesson.num_outputs, lesson.num_outputs)
    assert lesson.validate(model).loss > 0
    assert decoded == []


def test_arrays_come_back_as_they_were_for_any_number_of_threads(tmp_path: Path) -> None:
    spool = DecodedShards(tmp_path, 2**20)
    shards = [{name: array + key for name, array in A_SHARD.items()} for key in range(100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(spool.put, range(100), shards))
        found = list(pool.map(spool.get, range(100)))
    for expected, own in zip(shards, found, strict=True):
        assert own is not None
        assert own.keys() == expected.keys()
        for name, array in own.items():
            assert array.dtype == expected[name].dtype
            np.testing.assert_array_equal(array, expected[name])
    assert spool.get(100) is None


def test_a_limit_is_kept_and_a_full_disk_is_only_the_end_of_keeping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = DecodedShards(tmp_path, 1000)
    for key in range(9):
        spool.put(key, A_SHARD)
    kept = [key for key in range(9) if spool.get(key) is not None]
    assert kept == [0, 1, 2, 3, 4], "136 bytes each, aligned, and 1,000 at most"
    spool = DecodedShards(tmp_path, 2**20)
    spool.put(0, A_SHARD)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        spool.put(1, A_SHARD)
    spool.put(2, A_SHARD)
    assert [key for key in range(3) if spool.get(key) is not None] == [0]


def test_a_directory_that_cannot_be_written_ends_no_training_and_no_room_makes_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    spool = DecodedShards(tmp_path / "file", 2**20)
    spool.put(0, A_SHARD)
    assert spool.get(0) is None
    DecodedShards(tmp_path / "new", 0).put(0, A_SHARD)
    assert not (tmp_path / "new").exists()


def test_a_forked_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    spool = DecodedShards(tmp_path, 2**20)
    spool.put(0, A_SHARD)
    child = os.fork()
    if child == 0:
        failed = True
        try:
            known = spool.get(0) is not None
            spool.put(1, {"few": np.full(500, 7)})
            failed = known or spool.get(1) is None
        finally:
            os._exit(int(failed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    spool.put(2, A_SHARD)
    for key in (0, 2):
        found = spool.get(key)
        assert found is not None
        np.testing.assert_array_equal(found["table"], np.eye(3))
    assert spool.get(1) is None
