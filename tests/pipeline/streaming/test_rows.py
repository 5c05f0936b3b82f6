"""Training rows: each once an epoch, in an order of (seed, epoch) alone, with the targets that are theirs."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.rows import POOL, Rows
from pipeline.data.tokenizer import Tokens
from pipeline.streaming import batch as streaming_batch
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.prefetch import prefetch
from pipeline.streaming.rows import CachedRows
from pipeline.teachers.record import teacher_reader
from storage import Cache
from storage.errors import SpecMismatch
from tests.pipeline.conftest import World


def read(world: World, rows: Rows) -> Tokens:
    return teacher_reader(world.teacher).read(rows.texts.to_pylist(), rows.row_ids)


def cached(world: World, rows: Rows, *splits: str) -> CachedRows:
    return CachedRows(Cache.open(world.cache), rows, read(world, rows), 0, splits)


def reorder(rows: Rows, order: np.ndarray) -> Rows:
    take = pa.array(order)
    return Rows(
        rows.row_ids.take(take),
        rows.texts.take(take),
        rows.labels[order],
        rows.splits[order],
        rows.label_names,
    )


def logits_by_inputs(world: World) -> dict[tuple[int, ...], list[float]]:
    """What the cache holds, by the token ids of the row: a join that does not know row ids."""
    rows, said = world.rows(), {}
    cache = Cache.open(world.cache)
    for shard in cache.shards:
        part = cache.read(shard)
        said |= dict(zip(part.row_ids.to_pylist(), part.logits.tolist(), strict=True))
    tokens = read(world, rows)
    return {tuple(tokens.row(i).tolist()): said[row] for i, row in enumerate(rows.row_ids.to_pylist())}


def contents(stream: Iterator[DistillBatch]) -> list[tuple[tuple[int, ...], int, list[float]]]:
    """(token ids, label, teacher's logits) of each row, in the order of the stream."""
    found = []
    for batch in stream:
        rows = (batch.inputs["input_ids"], batch.mask, batch.labels_T, batch.teacher)
        for ids, mask, label, logits in zip(*rows, strict=True):
            found.append((tuple(ids[mask].tolist()), int(label), logits.tolist()))
    return found


def test_an_epoch_sees_each_row_once_with_its_own_label_and_targets(world: World) -> None:
    rows = world.rows()
    expected_logits, tokens = logits_by_inputs(world), read(world, rows)
    chosen = rows.select("train", POOL)
    expected = [
        (ids := tuple(tokens.row(i).tolist()), int(rows.labels[i]), expected_logits[ids]) for i in chosen
    ]
    some = cached(world, rows, "train", POOL)
    for stream in (some.epoch(0, 0, 16), some.epoch(0, 1, 7), some.in_order(16)):
        assert sorted(contents(stream)) == sorted(expected)


def test_targets_are_joined_by_row_id_although_the_dataset_has_another_order_and_repeats(
    world: World,
) -> None:
    rows = world.rows()
    order = np.random.default_rng(0).permutation(np.concatenate([np.arange(180), np.arange(40)]))
    shuffled = reorder(rows, order)
    expected = logits_by_inputs(world)
    some = cached(world, shuffled, "train", "validation", "test", POOL)
    found = contents(some.epoch(3, 0, 16))
    assert len(found) == 220
    assert all(logits == expected[ids] for ids, _, logits in found)
    labels = {tuple(read(world, rows).row(i).tolist()): int(rows.labels[i]) for i in range(180)}
    assert all(label == labels[ids] for ids, label, _ in found)


def test_the_order_is_a_function_of_seed_and_epoch(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    some = cached(world, world.rows(), "train", POOL)
    first = contents(some.epoch(1, 0, 16))
    assert contents(cached(world, world.rows(), "train", POOL).epoch(1, 0, 16)) == first
    assert contents(some.epoch(1, 1, 16)) != first
    assert contents(some.epoch(2, 0, 16)) != first
    monkeypatch.setattr(streaming_batch, "PREFETCH_BYTES", 1)  # however far the reader may be ahead
    assert contents(some.epoch(1, 0, 16)) == first


def test_the_number_of_batches_is_never_more_than_was_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.streaming.rows.SHARDS_PER_WINDOW", 2)
    some = cached(world, world.rows(), "train", POOL)
    for epoch in range(4):
        assert len(list(some.epoch(0, epoch, 16))) <= some.num_batches(16)


def test_a_row_that_the_cache_lacks_is_refused_before_the_first_batch(world: World) -> None:
    rows = world.rows()
    other = rows._replace(row_ids=pa.array(["f" * 32, *rows.row_ids.to_pylist()[1:]]))
    with pytest.raises(SpecMismatch, match="rows without one"):
        cached(world, other, "train", "validation", "test")


def test_an_item_that_fails_fails_where_it_would_have_been_used() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("three")

    stream = prefetch(items(), 100, lambda item: 1)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(stream)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_consumer_that_stops_early_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    stream = prefetch(endless(), 5, lambda item: 1)
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert threads() == []
    for _ in prefetch(endless(), 5, lambda item: 1):
        break  # a loop that is left drops its iterator
    assert threads() == []


def test_the_reader_stays_within_its_bytes() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    used = 0
    for _ in prefetch(items(), 40, lambda item: 10):
        used += 1
        time.sleep(0.001)
        assert len(made) - used <= 5  # four that wait, and one in the hand
    assert used == 50


def test_an_item_larger_than_the_limit_passes_alone() -> None:
    assert list(prefetch([1, 2, 3], 5, lambda item: 100)) == [1, 2, 3]
