"""Hidden states in batches: each row's own, of the tokens that the student reads, or refused in time."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.config.caches import CacheEntry
from pipeline.data.rows import POOL, Rows, load_rows
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.streaming import hidden_states
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.hidden_states import shards_in_memory
from pipeline.streaming.rows import CachedRows
from pipeline.teachers.record import teacher_reader
from storage import Cache
from storage.errors import SpecMismatch
from storage.records import EntryRows
from storage.writer import Store
from tests import toy
from tests.pipeline.conftest import World
from tests.pipeline.prose import Prose

NAMES = ("layer.2", "qkv.1")


@pytest.fixture(scope="module")
def states(world: World, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """The toy cache with a state a token."""
    return make(world, tmp_path_factory.mktemp("states"), layers=[2], qkv=[1], pool="none", dtype="int8")


def make(world: World, root: Path, **hidden: Any) -> Cache:
    body = {"dataset": "toy", "teacher": "tiny", "hidden": hidden, "precision": "float32", "shard_rows": 32}
    entry, store = CacheEntry.model_validate(body), Store(root / "store")
    capture_cache(CaptureJob("toy", entry, world.dataset, world.teacher, root / "cache", store))
    return Cache.open(root / "cache")


def read(world: World, rows: Rows) -> Tokens:
    return teacher_reader(world.teacher).read(rows.texts.to_pylist(), rows.row_ids)


def expected_states(cache: Cache) -> dict[str, dict[str, np.ndarray]]:
    """row id -> name -> the vectors of the row: by counting tokens along each shard."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for shard in cache.shards:
        rows, first = cache.read(shard), 0
        for place, (row, length) in enumerate(zip(rows.row_ids.to_pylist(), rows.num_tokens, strict=True)):
            own = slice(first, first + int(length)) if cache.hidden_per_position else slice(place, place + 1)
            found[row] = {name: cache.hidden(shard, name)[own] for name in cache.hidden_names}
            first += int(length)
    return found


def check_rows(batch: DistillBatch, row_of: dict[tuple[int, ...], str], expected: Any, pooled: bool) -> int:
    """Each row of the batch has its own vectors, in the order of the mask. Returns the number of rows."""
    parts = 0
    for ids, mask in zip(batch.inputs["input_ids"], batch.mask, strict=True):
        row = row_of[tuple(ids[mask].tolist())]
        length = 1 if pooled else int(mask.sum())
        for name, vectors in batch.hidden.items():
            assert np.array_equal(vectors[parts : parts + length].numpy(), expected[row][name])
        parts += length
    assert all(len(vectors) == parts for vectors in batch.hidden.values())
    return batch.own_rows


def test_each_row_of_a_batch_has_its_own_states_in_the_order_of_the_mask(world: World, states: Cache) -> None:
    """The dataset has another order than the cache, and some rows twice."""
    rows = world.rows()
    order = np.random.default_rng(0).permutation(np.concatenate([np.arange(180), np.arange(30)]))
    take = pa.array(order)
    mixed = Rows(
        rows.row_ids.take(take), rows.texts.take(take), rows.labels[order], rows.splits[order],
        rows.label_names,
    )  # fmt: skip
    tokens, expected = read(world, mixed), expected_states(states)
    row_of = {tuple(tokens.row(i).tolist()): row for i, row in enumerate(mixed.row_ids.to_pylist())}
    cached = CachedRows(states, mixed, tokens, 0, ("train", POOL), NAMES)
    for stream in (cached.epoch(0, 0, 16), cached.in_order(16)):
        seen = 0
        for batch in stream:
            assert tuple(batch.hidden) == NAMES
            seen += check_rows(batch, row_of, expected, pooled=False)
        assert seen == cached.num_rows


def test_pooled_states_are_one_a_row_and_ask_for_no_tokenizer(world: World) -> None:
    cache, rows = Cache.open(world.cache), world.rows()
    tokens, expected = read(world, rows), expected_states(cache)
    row_of = {tuple(tokens.row(i).tolist()): row for i, row in enumerate(rows.row_ids.to_pylist())}
    for batch in CachedRows(cache, rows, tokens, 0, ("train",), ("layer.1",)).epoch(0, 0, 16):
        check_rows(batch, row_of, expected, pooled=True)
    cut = TextReader(world.teacher, 4, "truncate").read(rows.texts.to_pylist(), rows.row_ids)
    assert CachedRows(cache, rows, cut, 0, ("train",), ("layer.1",)).num_rows > 0


def test_batches_without_names_have_no_states_and_the_same_order(world: World, states: Cache) -> None:
    tokens = read(world, world.rows())
    plain = list(CachedRows(states, world.rows(), tokens, 0, ("train",)).epoch(1, 0, 16))
    read_along = list(CachedRows(states, world.rows(), tokens, 0, ("train",), NAMES).epoch(1, 0, 16))
    assert all(not batch.hidden for batch in plain)
    ids, ids_along = ([batch.inputs["input_ids"].tolist() for batch in own] for own in (plain, read_along))
    assert ids == ids_along


def test_a_batch_knows_its_states_when_it_is_moved_and_measured(world: World, states: Cache) -> None:
    cached = CachedRows(states, world.rows(), read(world, world.rows()), 0, ("train",), NAMES)
    batch = next(iter(cached.in_order(8)))
    assert batch.to(torch.device("cpu")).hidden.keys() == batch.hidden.keys()
    own = sum(vectors.nbytes for vectors in batch.hidden.values())
    assert batch.num_bytes == batch._replace(hidden={}).num_bytes + own
    assert own > 0
    assert {vectors.device.type for vectors in batch.to(torch.device("meta")).hidden.values()} == {"meta"}


def test_fewer_shards_are_in_memory_where_states_fill_it(
    world: World, states: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(shard.positions for shard in states.shards)
    a_shard = 4 * largest * toy.WIDTH * 4
    for limit, expected in ((3 * a_shard, 3), (a_shard // 2, 1), (100 * a_shard, 16)):
        monkeypatch.setattr(hidden_states, "WINDOW_BYTES", limit)
        assert shards_in_memory(16, states, NAMES) == expected
    assert shards_in_memory(16, states, ()) == 16
    monkeypatch.setattr(hidden_states, "WINDOW_BYTES", 2 * a_shard)
    cached = CachedRows(states, world.rows(), read(world, world.rows()), 0, ("train", POOL), NAMES)
    batches = list(cached.epoch(0, 0, 16))
    assert sum(len(batch.labels_T) for batch in batches) == cached.num_rows
    assert len(batches) <= cached.num_batches(16)


def test_names_that_are_not_kept_are_refused_with_what_to_write(world: World, states: Cache) -> None:
    tokens = read(world, world.rows())
    with pytest.raises(SpecMismatch, match=r"\[layer\.2, qkv\.1\] +\[layer\.1\]") as refused:
        CachedRows(states, world.rows(), tokens, 0, ("train",), ("layer.1", "qkv.1"))
    assert "under caches.cache in params.yaml" in str(refused.value)


def test_students_that_read_other_tokens_are_refused_before_a_step(world: World, states: Cache) -> None:
    rows = world.rows()
    cut = TextReader(world.teacher, 8, "truncate").read(rows.texts.to_pylist(), rows.row_ids)
    whole = read(world, rows)
    train = rows.select("train")
    same = int((whole.lengths[train] <= 8).sum())
    longest = int(whole.lengths[train].max())
    with pytest.raises(SpecMismatch, match=rf"rows read as the teacher did +{same} +{len(train)}") as refused:
        CachedRows(states, rows, cut, 0, ("train",), NAMES)
    assert f"max_length of at least {longest} tokens" in str(refused.value)
    assert CachedRows(states, rows, cut, 0, ("train",)).num_rows == len(train), "without states it may"


def test_pieces_of_documents_have_the_states_of_their_tokens(tmp_path: Path) -> None:
    prose = Prose(tmp_path)
    prose.make_teacher()
    body = {"dataset": "prose", "teacher": "tiny", "hidden": {"layers": [1], "pool": "none"}}
    made = prose.entry().model_copy(update={"hidden": CacheEntry.model_validate(body).hidden})
    capture_cache(
        CaptureJob("prose", made, prose.dataset, prose.teacher, prose.cache, Store(tmp_path / "store"))
    )
    cache, rows = Cache.open(prose.cache), load_rows(prose.dataset)
    every: dict[tuple[int, ...], list[np.ndarray]] = {}
    for shard in cache.shards:
        held, first, kept = cache.read(shard), 0, cache.hidden(shard, "layer.1")
        assert isinstance(held, EntryRows)
        assert held.token_ids is not None
        for length in held.num_tokens.tolist():
            for start in range(0, length - 1, 7):
                own = slice(first + start, first + min(start + 7, length - 1))
                every.setdefault(tuple(held.token_ids[own].tolist()), []).append(kept[own])
            first += length
    cached = CachedDocuments(cache, rows, ("train",), 7, ("layer.1",))
    for stream in (cached.epoch(0, 0, 40), cached.in_order(40)):
        pieces = 0
        for batch in stream:
            states, first = batch.hidden["layer.1"].numpy(), 0
            assert len(states) == len(batch.labels_T)
            for ids, mask in zip(batch.inputs["input_ids"], batch.mask, strict=True):
                own = states[first : first + int(mask.sum())]
                assert any(np.array_equal(own, other) for other in every[tuple(ids[mask].tolist())])
                first, pieces = first + len(own), pieces + 1
        assert pieces == cached.num_pieces
    with pytest.raises(SpecMismatch, match=r"\[layer\.1\] +\[layer\.2\]"):
        CachedDocuments(cache, rows, ("train",), 7, ("layer.2",))
