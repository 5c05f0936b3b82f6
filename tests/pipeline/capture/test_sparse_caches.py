"""Sparse targets from the teacher to the student: captured, sealed, verified, resumed, grown, trained from.

The toy teacher has two classes; a codec does not know that this is few.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.config.caches import CacheEntry
from pipeline.config.params import Workers
from pipeline.training.run import train_run
from storage import Cache, manifest, records
from storage.codecs import PLAIN, Column, Sample, Threshold
from storage.entries import Entries, concatenate
from storage.errors import ManifestInvalid, ShardCorrupt, SpecMismatch
from storage.fingerprints import canonical_json, sha256_json
from storage.records import EntryRows
from tests.pipeline.capture.test_capture import append_rows, content, no_teacher
from tests.pipeline.conftest import World

CODECS: dict[str, dict[str, Any]] = {
    "topk": {"codec": "topk", "k": 1},
    "sample": {"codec": "sample", "draws": 9},
    "threshold": {"codec": "threshold", "tau": 0.2},
}


def chosen(codec: str, layout: str = "compact", **settings: Any) -> dict[str, Any]:
    """An entry of a cache, as in params.yaml."""
    entry = CacheEntry.model_validate(
        {"dataset": "toy", "teacher": "tiny", "targets": {**CODECS[codec], "layout": layout, **settings}}
    )
    return {"targets": entry.targets, "shard_rows": 50}


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path / "own")


def entries_by_row(cache: Cache) -> dict[str, list[tuple[int, float]]]:
    """row id -> its (id, weight) pairs, by id."""
    found: dict[str, list[tuple[int, float]]] = {}
    for shard in cache.shards:
        rows = cache.read(shard)
        assert isinstance(rows, EntryRows)
        bounds = zip(rows.entries.offsets[:-1], rows.entries.offsets[1:], strict=True)
        pairs = list(zip(rows.entries.ids.tolist(), rows.entries.weights.tolist(), strict=True))
        for row, (start, end) in zip(rows.row_ids.to_pylist(), bounds, strict=True):
            found[row] = sorted(pairs[start:end])
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_plain_and_compact_hold_the_same_entries(own: World, codec: str) -> None:
    own.capture(**chosen(codec, "plain"))
    plain = entries_by_row(Cache.open(own.cache))
    own.capture(**chosen(codec, "compact"))
    compact = entries_by_row(Cache.open(own.cache))
    assert plain.keys() == compact.keys() == set(own.rows().row_ids.to_pylist())
    for row, pairs in plain.items():
        assert [i for i, _ in pairs] == [i for i, _ in compact[row]]
        assert [w for _, w in compact[row]] == pytest.approx([w for _, w in pairs], abs=0.03)


@pytest.mark.parametrize("layout", ["plain", "compact"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_sparse_cache_is_verified_by_its_teacher_and_refused_to_another(
    own: World, codec: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "entry", lambda self, **changes: entry(self, changes, codec, layout))
    own.capture()
    assert own.check()["rows"] == 180
    rows = Cache.open(own.cache).manifest.shards[0]
    assert rows.rows == 50


def entry(own: World, changes: dict[str, Any], codec: str, layout: str) -> CacheEntry:
    known = own.params.caches["toy"]
    return known.model_copy(update={"precision": "float32", **chosen(codec, layout), **changes})


def test_a_replay_finds_entries_that_the_teacher_would_not_give(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed draws other ids."""
    monkeypatch.setitem(CODECS["sample"], "draws", 1)
    monkeypatch.setattr(World, "entry", lambda self, **changes: entry(self, changes, "sample", "plain"))
    own.capture()
    assert own.check()["replayed_rows"] > 0
    forged = own.entry().targets.model_copy(update={"seed": 1})
    shutil.rmtree(own.store.root)
    own.capture(targets=forged)
    disguise(own, lambda body: body["identity"]["spec"]["codec"].update(seed=0))
    with pytest.raises(SpecMismatch, match="entries given again"):
        own.check()


def disguise(own: World, change: Any) -> None:
    """Rewrite the manifest as a forger would, with a checksum that fits."""
    path = own.cache / manifest.MANIFEST_NAME
    body = json.loads(path.read_bytes())
    del body["checksum"]
    change(body)
    path.write_bytes(manifest.render(manifest.Manifest.model_validate(body)))


@pytest.mark.parametrize("codec", CODECS)
def test_a_killed_capture_continues_and_ends_in_the_same_bytes(own: World, codec: str) -> None:
    own.capture(**chosen(codec))
    before = content(own.cache)
    for shard in Cache.open(own.cache).shards[-2:]:  # the store holds those of other caches too
        shutil.rmtree(next(own.store.root.rglob(shard.key)))
    captured = own.capture(**chosen(codec))
    assert content(own.cache) == before
    assert 0 < captured.computed_rows <= 100


def test_appended_rows_keep_the_table_of_frequent_ids_and_the_old_shards(own: World) -> None:
    own.capture(**chosen("threshold"))
    before = Cache.open(own.cache)
    append_rows(own, 20)
    captured = own.capture(**chosen("threshold"))
    after = Cache.open(own.cache)
    assert captured.computed_rows == 20
    assert after.manifest.ranks == before.manifest.ranks
    assert {s.key for s in before.shards} < {s.key for s in after.shards}


def test_without_missing_shards_no_teacher_is_loaded(own: World, monkeypatch: pytest.MonkeyPatch) -> None:
    own.capture(**chosen("threshold"))
    monkeypatch.setattr("pipeline.engines.classifier.load_classifier", no_teacher)
    assert own.capture(**chosen("threshold")).computed_rows == 0


def test_pandas_reads_plain_shards_without_us(own: World) -> None:
    own.capture(**chosen("topk", "plain"))
    cache = Cache.open(own.cache)
    frame = pd.read_parquet(own.cache / cache.shards[0].logits_path)
    row = frame.iloc[0]
    total = np.exp(row.log_probs).sum() + np.exp(row.log_tail).sum()
    assert total == pytest.approx(1, abs=1e-5)
    assert entries_by_row(cache)[row.row_id][0][0] == row.ids[0]


def test_sparse_caches_are_of_format_2_and_dense_ones_of_format_1(own: World) -> None:
    assert Cache.open(own.cache).manifest.format_version == 1
    own.capture(**chosen("threshold"))
    assert Cache.open(own.cache).manifest.format_version == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(format_version=1), "format_version is 1"),
        (lambda body: body.update(ranks=body["ranks"][::-1]), "ranks are not those"),
        (lambda body: body.pop("ranks"), "ranks are not those"),
        (lambda body: body.update(ranks=[0, 0]), "ranks"),
    ],
)
def test_a_manifest_whose_ranks_or_version_do_not_fit_is_refused(
    own: World, change: Any, message: str
) -> None:
    own.capture(**chosen("threshold"))
    path = own.cache / manifest.MANIFEST_NAME
    body = json.loads(path.read_bytes())
    del body["checksum"]
    change(body)
    path.write_bytes(canonical_json({**body, "checksum": sha256_json(body)}) + b"\n")
    with pytest.raises(ManifestInvalid, match=message):
        Cache.open(own.cache)


class Forged(Sample):
    """The codec as a forger would write it: lists of the old lengths, whatever `num_entries` counts."""

    plain_columns: ClassVar[Mapping[str, Column]] = PLAIN | {
        name: PLAIN[name]._replace(counted_by="old") for name in ("ids", "log_probs")
    }


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("num_entries", lambda values: values + 1, "num_entries counts"),
        ("ids", lambda values: values + 2, "outside the vocabulary"),
        ("ids", lambda values: -values - 1, "outside the vocabulary"),
        ("log_probs", lambda values: values + 9, "not a probability"),
        ("log_probs", lambda values: values * np.nan, "not a probability"),
    ],
)
def test_a_shard_that_holds_no_targets_is_refused(
    own: World, tmp_path: Path, column: str, change: Any, message: str
) -> None:
    own.capture(**chosen("sample", "plain"))
    cache = Cache.open(own.cache)
    rows = cache.read(cache.shards[0])
    assert isinstance(rows, EntryRows)
    assert isinstance(cache.codec, Sample)
    plain = cache.codec.pack(rows.entries) | {"old": rows.entries.counts}
    plain[column] = change(plain[column])
    forged = Forged(**cache.codec.model_dump())
    records.write_sparse(tmp_path / "x.parquet", rows, forged, cache.labels, plain)
    with pytest.raises(ShardCorrupt, match=message):
        records.read_sparse(tmp_path / "x.parquet", cache.codec, cache.ranks)


def test_a_shard_of_another_codec_is_refused(own: World) -> None:
    own.capture(**chosen("sample", "plain"))
    cache = Cache.open(own.cache)
    other = Threshold(tau=0.07, seed=0, layout="plain")
    with pytest.raises(ShardCorrupt, match="another layout"):
        records.read_sparse(own.cache / cache.shards[0].logits_path, other, cache.ranks)


def trained(own: World, out: Path) -> list[float]:
    """The training losses of a student at temperature 1, from the cache as it is now."""
    own.verified.write_text(json.dumps(own.check()))
    params = own.params
    recipe = params.recipes["kd-pool"].model_copy(update={"temperature": 1.0})
    run = params.runs["fc-kd-pool"].model_copy(update={"seeds": (0,)})
    record = train_run("r", run, params.students["fc"], recipe, own.run_paths(out), Workers(seeds_at_once=1))
    assert record["seeds"][0]["teacher_rows_seen"] > 0
    return [point["train_loss"] for point in record["seeds"][0]["curve"]]


@pytest.mark.parametrize("codec", CODECS)
def test_a_student_learns_from_entries_what_it_learns_from_logits(
    own: World, codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the error of the codec: rounding where both classes are kept, noise where they are drawn."""
    dense = trained(own, tmp_path / "dense")
    if codec == "topk":
        monkeypatch.setitem(CODECS["topk"], "k", 2)
    same_shards = {"shard_rows": own.params.caches["toy"].shard_rows}
    monkeypatch.setattr(World, "entry", lambda self, **more: entry(self, same_shards | more, codec, "plain"))
    own.capture()
    sparse = trained(own, tmp_path / "sparse")
    assert sparse == pytest.approx(dense, abs=1e-4 if codec == "topk" else 0.1)


def test_a_recipe_that_truncated_targets_cannot_serve_is_refused_before_the_first_step(
    own: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "entry", lambda self, **changes: entry(self, changes, "topk", "compact"))
    own.capture()
    own.verified.write_text(json.dumps(own.check()))
    params = own.params
    recipe = params.recipes["kd-pool"].model_copy(update={"divergence": "reverse"})
    with pytest.raises(SpecMismatch, match=r"recipe\.divergence"):
        train_run(
            "r",
            params.runs["fc-kd-pool"],
            params.students["fc"],
            recipe,
            own.run_paths(tmp_path),
            Workers(seeds_at_once=1),
        )


def test_entries_are_taken_and_joined_by_position() -> None:
    none = np.full(3, -np.inf, np.float32)
    one = Entries(
        np.array([0, 2, 2, 3]), np.array([4, 5, 6], np.int32), np.array([0.5, 0.5, 1], np.float32),
        np.array([1, 0, 1], np.int32), none,
    )  # fmt: skip
    both = concatenate([one, one]).take(np.array([5, 0, 1]))
    assert both.offsets.tolist() == [0, 1, 3, 3]
    assert both.ids.tolist() == [6, 4, 5]
    assert both.positions.tolist() == [0, 1, 1]
    assert both.num_exact.tolist() == [1, 1, 0]


def test_every_list_of_a_sparse_shard_is_split_by_bytes(own: World) -> None:
    own.capture(**chosen("threshold"))
    cache = Cache.open(own.cache)
    group = pq.read_metadata(own.cache / cache.shards[0].logits_path).row_group(0)
    encodings = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    assert all("BYTE_STREAM_SPLIT" in found for name, found in encodings.items() if "list" in name)
