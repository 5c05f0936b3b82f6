"""Shards are named before they are looked for, and the plan by names is the plan by rows."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.capture.shard_keys import (
    cut_into_shards,
    first_occurrences,
    key_bytes,
    key_names,
    key_places,
    plan_reuse,
    unfinished_shards,
)
from storage.fingerprints import input_hash, row_id
from storage.spec import shard_key
from tests.pipeline.capture.test_plan import shard
from tests.storage.conftest import IDENTITY


def rows_of(numbers: list[int]) -> tuple[list[str], list[str]]:
    """(row ids, input hashes) of made-up rows."""
    return [row_id("toy", str(n)) for n in numbers], [input_hash([n]) for n in numbers]


def strings(values: list[str]) -> pa.StringArray:
    """As datasets hold them: a part of a longer array."""
    return pa.array(["before", *values, "after"], pa.string()).slice(1, len(values))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 9))
def test_each_shard_has_its_key_and_each_distinct_row_its_shard(numbers: list[int], shard_rows: int) -> None:
    ids, inputs = rows_of(numbers)
    cut = cut_into_shards(IDENTITY, strings(ids), strings(inputs), shard_rows)
    parts = plan_reuse(ids, [], shard_rows)[1]
    assert [cut.part(i).tolist() for i in range(len(cut.keys))] == [part.tolist() for part in parts]
    assert cut.names() == [shard_key(IDENTITY, [ids[i] for i in p], [inputs[i] for i in p]) for p in parts]


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_where_only_own_shards_are_finished_the_plan_by_names_is_that_by_rows(
    num: int, shard_rows: int, data: st.DataObject
) -> None:
    ids, inputs = rows_of(list(range(num)))
    cut = cut_into_shards(IDENTITY, pa.array(ids), pa.array(inputs), shard_rows)
    own = [shard([ids[row] for row in cut.part(i)], int(name, 16)) for i, name in enumerate(cut.names())]
    finished = data.draw(st.lists(st.sampled_from(own), unique_by=lambda s: s.entry.key))
    finished.sort(key=lambda s: (-s.entry.rows, s.entry.key))
    taken, parts = plan_reuse(ids, finished, shard_rows)
    left = unfinished_shards(cut, key_bytes(s.entry.key for s in finished))
    assert left is not None
    assert taken == finished
    assert [cut.part(i).tolist() for i in left] == [part.tolist() for part in parts]


def test_a_finished_shard_of_other_rows_must_be_looked_at() -> None:
    ids, inputs = rows_of(list(range(6)))
    cut = cut_into_shards(IDENTITY, pa.array(ids), pa.array(inputs), 2)
    other = shard_key(IDENTITY, ids[1:3], inputs[1:3])
    assert unfinished_shards(cut, key_bytes([cut.names()[0], other])) is None


def test_keys_with_equal_first_bits_are_distinguished() -> None:
    alike = ["0" * 63 + digit for digit in "123"]
    keys = key_bytes(alike)
    assert key_places(keys, keys[:2]).tolist() == [0, 1, -1]
    assert key_places(keys, keys[2:]).tolist() == [-1, -1, 0]
    assert key_places(keys, keys[:0]).tolist() == [-1] * 3
    assert key_names(keys) == alike


def test_of_equal_rows_the_first_is_taken() -> None:
    ids = ["0" * 31 + "1", "0" * 31 + "2", "0" * 31 + "1"]
    assert first_occurrences(pa.array(ids)).tolist() == [0, 1]
    assert first_occurrences(pa.array(ids[:2])).tolist() == [0, 1]
    assert np.array_equal(first_occurrences(pa.array(ids[:0], pa.string())), np.arange(0))
