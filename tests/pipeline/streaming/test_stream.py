"""The same global batches for any number of processes and reading threads, from any place on."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent
from pipeline.data.rows import NO_LABEL, POOL, load_rows
from pipeline.losses.sparse import SparseTargets
from pipeline.streaming import documents, rows
from pipeline.streaming.batch import DistillBatch, Stream, has_label
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.rows import CachedRows
from pipeline.students.registry import build_student
from pipeline.teachers.record import teacher_reader
from pipeline.training.rows_workload import rows_workload
from pipeline.training.workload import TrainingData, Workload
from storage import Cache, order
from storage.errors import ShardCorrupt
from tests.pipeline.conftest import World
from tests.pipeline.prose import Prose

Row = tuple[object, ...]


@pytest.fixture(autouse=True)
def _several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SHARDS_PER_WINDOW", 2)
    monkeypatch.setattr(documents, "SHARDS_PER_WINDOW", 2)


def rows_of(batch: DistillBatch) -> list[Row]:
    """(tokens, label or next tokens, what the teacher said) of each row that counts."""
    if batch.whole and batch.whole.empty:
        return []
    found: list[Row] = []
    lengths = batch.mask.sum(1).tolist()
    if isinstance(batch.teacher, SparseTargets):
        said = [[] for _ in batch.labels_T]
        for position, entry, weight in zip(*(part.tolist() for part in batch.teacher[:3]), strict=True):
            said[position].append((entry, weight))
        ends = np.cumsum([0, *lengths])
        for ids, length, first in zip(batch.inputs["input_ids"], lengths, ends, strict=False):
            labels = batch.labels_T[first : first + length].tolist()
            found.append((*ids[:length].tolist(), *labels, str(said[first : first + length])))
        return found
    assert isinstance(batch.teacher, torch.Tensor)
    ids_BL = batch.inputs["input_ids"]
    for ids, length, label, logits in zip(ids_BL, lengths, batch.labels_T, batch.teacher, strict=True):
        found.append((*ids[:length].tolist(), int(label), *logits.tolist()))
    return found


class Read:
    """The epochs of one kind of rows, as some stream reads them."""

    def __init__(self, world: World, prose: Prose, kind: str) -> None:
        self.world, self.prose, self.kind = world, prose, kind

    def cached(self, stream: Stream) -> CachedRows | CachedDocuments:
        if self.kind == "documents":
            rows = load_rows(self.prose.dataset)
            return CachedDocuments(Cache.open(self.prose.cache), rows, ("train",), 9, stream=stream)
        rows = self.world.rows()
        tokens = teacher_reader(self.world.teacher).read(rows.texts.to_pylist(), rows.row_ids)
        return CachedRows(
            Cache.open(self.world.cache), rows, tokens, 0, ("train", POOL), stream=stream
        )  # fmt: skip

    def epoch(self, start: int = 0, **stream: int) -> Iterator[DistillBatch]:
        size = 40 if self.kind == "documents" else 7
        return self.cached(Stream(**stream)).epoch(3, 1, size, start)

    def batches(self, start: int = 0, **stream: int) -> list[list[Row]]:
        return [rows_of(batch) for batch in self.epoch(start, **stream)]


@pytest.fixture(params=["rows", "documents"])
def read(request: pytest.FixtureRequest, world: World, prose: Prose) -> Read:
    return Read(world, prose, request.param)


def test_any_number_of_readers_gives_the_same_batches(read: Read) -> None:
    alone = read.batches(readers=0)
    assert len(alone) > 8
    for readers in (1, 2, 3):
        assert read.batches(readers=readers) == alone


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_parts_of_all_ranks_end_to_end_are_the_global_batches(read: Read, ranks: int) -> None:
    alone = read.batches()
    parts = [read.batches(rank=rank, ranks=ranks, readers=rank % 3) for rank in range(ranks)]
    assert [list(itertools.chain(*own)) for own in zip(*parts, strict=True)] == alone
    sizes = [sorted(len(part) for part in own) for own in zip(*parts, strict=True)]
    assert all(own[-1] - own[0] <= 1 for own in sizes), "the work is spread evenly"
    counted = [row for own in parts for batch in own for row in batch]
    assert len(counted) == sum(len(batch) for batch in alone), "none is repeated to fill a batch"


def test_from_any_place_on_the_rest_is_the_same_and_what_lies_before_is_not_read(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read.batches()
    decoded: list[int] = []
    cached_read = Cache.read
    monkeypatch.setattr(Cache, "read", lambda self, shard: decoded.append(1) or cached_read(self, shard))
    read.batches()
    everything = len(decoded)
    for start in range(len(whole) + 1):
        decoded.clear()
        assert read.batches(start, readers=start % 3) == whole[start:]
    assert decoded == []
    read.batches(len(whole) - 1)
    assert 0 < len(decoded) < everything


def test_evaluation_has_one_window_of_shards_in_memory_and_sees_each_row_once(
    read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    cached_read = Cache.read
    monkeypatch.setattr(Cache, "read", lambda self, shard: decoded.append(1) or cached_read(self, shard))
    cached = read.cached(Stream())
    stream = cached.in_order(16)
    seen = rows_of(next(stream))
    assert len(decoded) <= 2 < len(cached.cache.shards)
    for batch in stream:
        seen += rows_of(batch)
    assert sorted(map(str, seen)) == sorted(str(row) for batch in read.batches() for row in batch)


def test_what_a_batch_is_a_part_of_is_counted_over_all_ranks(read: Read) -> None:
    alone = list(read.epoch())
    for rank in (0, 3):
        for part, batch in zip(read.epoch(rank=rank, ranks=4), alone, strict=True):
            assert part.whole is not None
            assert (part.num_rows, part.num_targets) == (batch.own_rows, len(batch.labels_T))
            assert part.whole.labelled == int(has_label(batch.labels_T.numpy()).sum())


def test_damage_is_raised_in_its_place_whoever_reads(world: World, prose: Prose, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "own")
    read = Read(own, prose, "rows")
    streams = [read.epoch(readers=readers) for readers in (0, 1, 3)]
    shard = max(own.cache.glob("logits/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1])
    for stream in streams:
        with pytest.raises(ShardCorrupt):
            list(stream)


@given(st.integers(0, 40), st.integers(1, 8))
def test_parts_are_contiguous_even_and_never_repeat(size: int, ranks: int) -> None:
    batch = np.arange(size)
    parts = [order.part(batch, rank, ranks) for rank in range(ranks)]
    assert np.concatenate(parts).tolist() == batch.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("alpha", "pseudo"), [(0.0, False), (0.3, False), (1.0, True)])
@pytest.mark.parametrize("ranks", [2, 4, 9])
def test_the_mean_of_all_ranks_losses_is_the_loss_of_the_whole_batch(
    world: World, alpha: float, ranks: int, pseudo: bool
) -> None:
    """Labelled and unlabelled rows are unevenly spread, and nine ranks share seven rows."""
    recipe = Recipe(alpha=alpha, temperature=2.0, pool=True, batch_rows=7, pseudo_labels=pseudo)
    rows = world.rows()
    reader = teacher_reader(world.teacher)
    entry = FCStudent(kind="fc", embedding=4, hidden=4, dropout=0.0)

    def lesson(rank: int, of: int) -> Workload:
        cache = Cache.open(world.cache)
        return rows_workload(entry, recipe, TrainingData(cache, rows, reader), 0, Stream(rank, of))

    torch.manual_seed(0)
    model = build_student(entry, reader.num_ids, 2).double()
    whole = lesson(0, 1)
    expected = [whole.loss(model, batch, 0.0).item() for batch in whole.batches(0)]
    parts = [lesson(rank, ranks) for rank in range(ranks)]
    found = [[part.loss(model, batch, 0.0).item() for batch in part.batches(0)] for part in parts]
    assert np.mean(found, axis=0) == pytest.approx(expected, rel=1e-6)
    if not pseudo:
        assert any((batch.labels_T == NO_LABEL).any() for batch in whole.batches(0))
