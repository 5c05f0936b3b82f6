"""Caches of two machines become one, each row once; what does not fit is refused, field by field."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage import Cache, hidden, records
from storage.errors import ConfigError, ShardCorrupt, SpecMismatch
from storage.manifest import MANIFEST_NAME
from storage.merging import merge, unpinned
from storage.seal import SealedParts, seal
from storage.verify import verify
from storage.writer import Store
from tests.golden import make_states
from tests.storage.conftest import IDENTITY, make_rows
from tests.storage.conftest import make_states as states_of
from tests.storage.test_refusals import rewrite

GOLDEN = Path(__file__).parents[1] / "golden"
SPARSE = sorted(
    p.parent for name in ("sparse-v2", "positions-v3") for p in (GOLDEN / name).glob("*/manifest.json")
)


def captured(root: Path, *parts: tuple[int, int], **changes: Any) -> Cache:
    """A cache over these ranges of rows, a shard each, made on a machine of its own."""
    store, shards = Store(root / "store"), []
    who = IDENTITY.model_copy(update=changes)
    for first, num in parts:
        rows = make_rows(first, num)
        shards.append(store.put(who, rows, states_of(rows), 1.0))
    seal(root / "cache", SealedParts(who, shards, {"tokenizer.json": b"{}"}, {"machine": root.name}))
    return Cache.open(root / "cache")


def every_row(cache: Cache) -> dict[str, tuple[Any, ...]]:
    """The targets of each row."""
    found = {}
    for shard in cache.shards:
        rows = cache.read(shard)
        assert isinstance(rows, records.LogitRows)
        states = [cache.hidden(shard, name) for name in cache.hidden_names]
        for i, row in enumerate(rows.row_ids.to_pylist()):
            found[row] = (rows.logits[i].tolist(), *(values[i].tolist() for values in states))
    return found


def test_rows_of_both_are_there_once_and_those_of_both_are_left_out_of_the_second(tmp_path: Path) -> None:
    one = captured(tmp_path / "one", (0, 5), (5, 3))
    two = captured(tmp_path / "two", (5, 3), (6, 4), (20, 2))
    whole = captured(tmp_path / "whole", (0, 5), (5, 3), (8, 2), (20, 2))
    store = Store(tmp_path / "store")
    merged = merge([one, two], tmp_path / "merged", store)
    found = Cache.open(tmp_path / "merged")
    assert merged.dropped_rows == 5
    assert verify(found).rows == 12
    assert every_row(found) == every_row(whole)
    for field in ("identity", "dataset", "shards", "tokenizer_files"):
        assert getattr(found.manifest, field) == getattr(whole.manifest, field), field
    assert found.manifest.provenance == {
        "machine": "one", "merged": [one.manifest_sha256, two.manifest_sha256]
    }  # fmt: skip
    assert {s.entry.key for s in store.finished(IDENTITY)} == {s.key for s in found.shards}


@pytest.mark.parametrize("path", SPARSE, ids=lambda p: p.name)
def test_some_rows_of_a_shard_are_written_as_a_capture_writes_them(path: Path, tmp_path: Path) -> None:
    whole = Cache.open(path)
    spec = whole.identity.spec
    for shard in whole.shards:
        table = records.read_table(path / shard.logits_path, spec)
        records.write_table(tmp_path / "again.parquet", table, spec)
        assert (tmp_path / "again.parquet").read_bytes() == (path / shard.logits_path).read_bytes()
        records.write_table(tmp_path / "some.parquet", table.slice(0, 1), spec)
        assert records.read_table(tmp_path / "some.parquet", spec).equals(table.slice(0, 1))


@pytest.mark.parametrize("name", ["plain", "small"])
def test_hidden_states_of_tokens_are_written_as_a_capture_writes_them(name: str, tmp_path: Path) -> None:
    cache = Cache.open(make_states.GOLDEN / name)
    spec = cache.identity.spec.hidden
    assert spec is not None
    for shard in cache.shards:
        arrays = hidden.read_arrays(cache.path / shard.hidden_path, shard.positions, spec)
        hidden.write_arrays(tmp_path / shard.key, arrays, spec)
        for file in spec.files:
            assert (tmp_path / shard.key / file).read_bytes() == (
                cache.path / shard.hidden_path / file
            ).read_bytes()


def test_components_of_tokens_are_merged_row_by_row_with_their_basis(tmp_path: Path) -> None:
    cache = Cache.open(make_states.GOLDEN / "small")
    store = Store(tmp_path / "first")
    shard = cache.shards[0]
    some = merge([cache], tmp_path / "copy", store)
    assert some.manifest.hidden_basis == cache.manifest.hidden_basis
    assert [s.key for s in some.manifest.shards] == [s.key for s in cache.shards]
    assert store.basis(unpinned(cache.identity)) is not None
    # The same rows in other shards: the last row of the first shard is in a shard of its own.
    from storage.merging import _take, _tokenizer

    last = _take(store, cache, shard, np.array([shard.rows - 1]))
    basis = cache.path / "hidden-basis"
    seal(tmp_path / "last", SealedParts(cache.identity, [last], _tokenizer(cache), {}, basis=basis))
    own = Cache.open(tmp_path / "last")
    verify(own)
    both = merge([own, cache], tmp_path / "both", Store(tmp_path / "second"))
    assert both.dropped_rows == 1
    merged = Cache.open(tmp_path / "both")
    assert verify(merged).rows == cache.num_rows
    assert sorted(merged.row_ids().to_pylist()) == sorted(cache.row_ids().to_pylist())


def test_caches_of_another_spec_are_refused_with_every_field(tmp_path: Path) -> None:
    one = captured(tmp_path / "one", (0, 2))
    spec = IDENTITY.spec.model_copy(update={"max_length": 8, "precision": "bfloat16"})
    two = captured(tmp_path / "two", (2, 2), spec=spec, capture_version=2)
    with pytest.raises(SpecMismatch) as refused:
        merge([one, two], tmp_path / "merged", Store(tmp_path / "store"))
    assert [fault.field for fault in refused.value.mismatches] == [
        "capture_version", "spec.max_length", "spec.precision"
    ]  # fmt: skip
    assert not (tmp_path / "merged").exists()


def test_another_tokenizer_file_is_refused(tmp_path: Path) -> None:
    one, two = captured(tmp_path / "one", (0, 2)), captured(tmp_path / "two", (2, 2))
    (two.path / "tokenizer" / "tokenizer.json").unlink()
    rewrite(two.path, lambda body: body.update(tokenizer_files=[]))
    with pytest.raises(SpecMismatch, match="tokenizer_files"):
        merge([one, Cache.open(two.path)], tmp_path / "merged", Store(tmp_path / "store"))


@pytest.mark.parametrize("column", ["logits", "layer.2"])
def test_a_row_that_is_not_the_same_in_both_is_refused_and_named(tmp_path: Path, column: str) -> None:
    one, store = captured(tmp_path / "one", (0, 4)), Store(tmp_path / "two")
    rows = make_rows(2, 4)
    states = states_of(rows)
    (rows.logits if column == "logits" else states[column])[1, 0] += 1
    seal(
        tmp_path / "other",
        SealedParts(IDENTITY, [store.put(IDENTITY, rows, states, 1.0)], {"tokenizer.json": b"{}"}, {}),
    )
    with pytest.raises(SpecMismatch, match="other targets than an earlier cache") as refused:
        merge([one, Cache.open(tmp_path / "other")], tmp_path / "merged", Store(tmp_path / "store"))
    assert [fault.field for fault in refused.value.mismatches] == [f"row {rows.row_ids[1]}: {column}"]


def test_a_damaged_cache_is_not_merged_and_none_is_written_over(tmp_path: Path) -> None:
    one, two = captured(tmp_path / "one", (0, 4)), captured(tmp_path / "two", (4, 4))
    with pytest.raises(ConfigError, match="exists already"):
        merge([one, two], one.path, Store(tmp_path / "store"))
    shutil.copytree(two.path, tmp_path / "damaged")
    path = next((tmp_path / "damaged" / "hidden").glob("*/layer.1/c.0.0"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ShardCorrupt, match=r"layer\.1/c\.0\.0 is damaged"):
        merge([one, Cache.open(tmp_path / "damaged")], tmp_path / "merged", Store(tmp_path / "store"))
    assert not (tmp_path / "merged" / MANIFEST_NAME).exists()
