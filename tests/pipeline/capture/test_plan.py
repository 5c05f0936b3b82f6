"""Which shards are taken and which are made: pure, and stable whatever has been finished so far."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.capture.shard_keys import plan_reuse
from storage.manifest import FileEntry, ShardEntry
from storage.writer import StoredShard


class FakeShard(StoredShard):
    """A finished shard that is all in memory."""

    rows: list[str]

    def row_ids(self) -> pa.StringArray:
        return pa.array(self.rows, pa.string())


def shard(rows: list[str], key: int = 0) -> FakeShard:
    name = f"{key:064x}"
    entry = ShardEntry(
        key=name,
        rows=len(rows),
        positions=len(rows),
        inputs="0" * 64,
        files=(FileEntry(path=f"logits/{name}.parquet", bytes=1, sha256="0" * 64),),
    )
    made = FakeShard(Path(), entry, 0.0)
    made.rows = rows
    return made


def largest_first(shards: list[FakeShard]) -> list[FakeShard]:
    """As Store.finished gives them."""
    return sorted(shards, key=lambda s: (-s.entry.rows, s.entry.key))


def made(row_ids: list[str], parts: list[np.ndarray]) -> list[list[str]]:
    return [[row_ids[i] for i in part] for part in parts]


def ids(num: int, first: int = 0) -> list[str]:
    return [f"row-{i}" for i in range(first, first + num)]


def test_with_nothing_finished_rows_are_cut_in_order() -> None:
    taken, parts = plan_reuse(ids(10), [], 4)
    assert taken == []
    assert made(ids(10), parts) == [ids(4), ids(4, 4), ids(2, 8)]


def test_duplicates_are_captured_once_at_their_first_place() -> None:
    rows = ["a", "b", "a", "c", "b"]
    assert [part.tolist() for part in plan_reuse(rows, [], 2)[1]] == [[0, 1], [3]]


@given(st.data())
def test_any_subset_of_finished_shards_leaves_the_same_shards_to_make(data: st.DataObject) -> None:
    num, per_shard = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 9))
    # earlier captures of other sizes, which overlap each other and reach beyond the dataset
    cuts = data.draw(st.lists(st.tuples(st.integers(0, 45), st.integers(1, 12)), max_size=4))
    earlier = [shard(ids(length, first), 1000 + n) for n, (first, length) in enumerate(cuts)]
    rows = data.draw(st.permutations(ids(num)))
    taken, parts = plan_reuse(rows, largest_first(earlier), per_shard)
    new = [shard(part, n) for n, part in enumerate(made(rows, parts))]
    finished = data.draw(st.lists(st.sampled_from(new), unique_by=id) if new else st.just([]))
    taken_again, parts_again = plan_reuse(rows, largest_first([*earlier, *finished]), per_shard)
    assert {s.entry.key for s in taken_again} == {s.entry.key for s in [*taken, *finished]}
    done = [s.rows for s in finished]
    assert made(rows, parts_again) == [part for part in made(rows, parts) if part not in done]


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 7), st.data())
def test_every_distinct_row_is_in_exactly_one_shard(
    numbers: list[int], per_shard: int, data: st.DataObject
) -> None:
    rows = [f"row-{i}" for i in numbers]
    cuts = data.draw(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=4))
    finished = largest_first([shard(ids(length, first), n) for n, (first, length) in enumerate(cuts)])
    taken, parts = plan_reuse(rows, finished, per_shard)
    held = [row for s in taken for row in s.row_ids().to_pylist()] + [r for p in made(rows, parts) for r in p]
    assert sorted(held) == sorted(set(rows))
    assert all(0 < len(part) <= per_shard for part in parts)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 9))
def test_appended_rows_make_new_shards_and_touch_no_other(before: int, more: int, per_shard: int) -> None:
    old = [
        shard(part, n) for n, part in enumerate(made(ids(before), plan_reuse(ids(before), [], per_shard)[1]))
    ]
    taken, parts = plan_reuse(ids(before + more), largest_first(old), per_shard)
    assert len(taken) == len(old)
    assert sorted(row for part in made(ids(before + more), parts) for row in part) == sorted(
        ids(more, before)
    )


def test_a_removed_row_costs_its_shard_alone() -> None:
    old = [shard(ids(4), 1), shard(ids(4, 4), 2), shard(ids(4, 8), 3)]
    left = [row for row in ids(12) if row != "row-5"]
    taken, parts = plan_reuse(left, largest_first(old), 4)
    assert [s.entry.key for s in taken] == [old[0].entry.key, old[2].entry.key]
    assert made(left, parts) == [["row-4", "row-6", "row-7"]]


def test_two_datasets_share_what_they_have_in_common() -> None:
    finished = [shard(ids(4), 1), shard(ids(4, 4), 2)]
    other = [*ids(4, 4), *ids(4, 100)]
    taken, parts = plan_reuse(other, finished, 4)
    assert [s.entry.key for s in taken] == [finished[1].entry.key]
    assert made(other, parts) == [ids(4, 100)]
