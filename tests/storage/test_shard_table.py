"""Caches with a table of shards: it has what a list would have; a wrong one is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from storage import Cache, manifest
from storage.checksums import file_entry
from storage.errors import ManifestInvalid, ShardCorrupt, ShardMissing, ShardTruncated
from storage.seal import SealedParts, seal
from storage.shard_table import Columns, ShardTable, file_names
from storage.verify import verify
from storage.writer import Store
from tests import s3 as server
from tests.golden import make_table
from tests.s3 import Server
from tests.storage.conftest import IDENTITY, fill
from tests.storage.test_refusals import rewrite

GOLDEN = Path(__file__).parents[1] / "golden" / "table-v5"
SPEC = IDENTITY.spec


@pytest.fixture
def tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the other tests, as if its two shards were very many."""
    monkeypatch.setattr(manifest, "MOST_LISTED", 1)
    shards = fill(Store(tmp_path / "store"))
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    seal(tmp_path / "caches" / "toy", SealedParts(IDENTITY, shards, files, {"teacher": "toy"}))
    return tmp_path / "caches" / "toy"


def change(tabled: Path, how: Callable[[Columns], Columns]) -> None:
    """Write another table, with a manifest that names it, as a forger would."""
    path = tabled / manifest.TABLE_NAME
    table = ShardTable.read(path, SPEC, path)
    ShardTable(SPEC, how(table.columns)).write(path)
    rewrite(tabled, lambda body: body.update(shard_table=file_entry(tabled, path.name).model_dump()))


def test_a_table_says_what_a_list_says(tabled: Path, sealed: Path) -> None:
    many, few = Cache.open(tabled), Cache.open(sealed)
    assert json.loads((tabled / "manifest.json").read_bytes())["shards"] == []
    assert many.manifest.format_version == 5
    assert tuple(many.shards) == tuple(few.shards)
    assert many.shards[-1] == few.shards[-1]
    assert many.shards[:1] == few.shards[:1]
    assert (many.num_rows, many.manifest.num_rows) == (8, 8)
    counts = verify(many)
    assert (counts.rows, counts.shards, counts.files) == (8, 2, verify(few).files + 1)


def test_few_shards_are_listed_as_they_always_were(sealed: Path) -> None:
    assert not (sealed / manifest.TABLE_NAME).exists()
    assert Cache.open(sealed).manifest.format_version == 1


def test_a_cache_with_a_table_is_read_from_a_bucket(s3: Server, tabled: Path, tmp_path: Path) -> None:
    url = server.upload(tabled, tmp_path.name)
    there = Cache.open(url, local=tmp_path / "near", limit_bytes=20_000)
    assert verify(there) == verify(Cache.open(tabled))


def test_shards_are_looked_at_when_they_are_read(tabled: Path) -> None:
    cache = Cache.open(tabled)
    path = tabled / cache.shards[1].logits_path
    sound = path.read_bytes()
    for content, error in [
        (sound[:-1], ShardTruncated),
        (sound[:-1] + b"?", ShardCorrupt),
        (None, ShardMissing),
    ]:
        path.unlink() if content is None else path.write_bytes(content)
        again = Cache.open(tabled)
        assert len(again.read(again.shards[0]).row_ids) == 5
        with pytest.raises(error, match=path.name):
            again.read(again.shards[1])


def test_a_table_that_is_missing_cut_or_changed_is_refused_when_the_cache_is_opened(tabled: Path) -> None:
    path = tabled / manifest.TABLE_NAME
    sound = path.read_bytes()
    for content, error in [
        (sound[:-1], ShardTruncated),
        (b"?" + sound[1:], ShardCorrupt),
        (None, ShardMissing),
    ]:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(error, match=r"shards\.parquet"):
            Cache.open(tabled)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda c: c._replace(rows=np.array([5, 0])), "less than one row"),
        (lambda c: c._replace(rows=np.array([5, 2**31 + 1])), "or too many"),
        (lambda c: c._replace(positions=np.array([-1, 2])), "positions or bytes is negative or too large"),
        (lambda c: c._replace(sizes=c.sizes + 2**53), "positions or bytes is negative or too large"),
        (lambda c: c._replace(keys=c.keys[[0, 0]]), "a shard is listed twice"),
        (
            lambda c: Columns(*(part[:0] for part in c[:4]), c.sizes[:, :0], c.digests[:, :0]),
            "has no shard",
        ),
    ],
    ids=range(6),
)
def test_numbers_that_cannot_be_are_refused(
    tabled: Path, how: Callable[[Columns], Columns], message: str
) -> None:
    change(tabled, how)
    with pytest.raises(ManifestInvalid, match=message):
        Cache.open(tabled)


def forge(tabled: Path, content: bytes) -> None:
    (tabled / manifest.TABLE_NAME).write_bytes(content)
    entry = file_entry(tabled, manifest.TABLE_NAME).model_dump()
    rewrite(tabled, lambda body: body.update(shard_table=entry))


def test_what_is_no_table_is_refused(tabled: Path) -> None:
    path = tabled / manifest.TABLE_NAME
    other = pq.read_table(path).drop_columns(["positions"])
    forge(tabled, b"no Parquet")
    with pytest.raises(ManifestInvalid, match="is not a table of shards"):
        Cache.open(tabled)
    pq.write_table(other, path)
    forge(tabled, path.read_bytes())
    with pytest.raises(ManifestInvalid, match="its columns are"):
        Cache.open(tabled)


def test_a_table_that_unfolds_to_far_more_than_it_has_is_refused_before_memory_is_taken(tabled: Path) -> None:
    path = tabled / manifest.TABLE_NAME
    one = pq.read_table(path).slice(0, 1)
    many = one.take([0] * 100_000)
    pq.write_table(many, path, compression="zstd")
    forge(tabled, path.read_bytes())
    with pytest.raises(ManifestInvalid, match="are too few for 100,000 shards"):
        Cache.open(tabled)


def test_shards_in_both_places_or_in_none_and_another_name_are_refused(tabled: Path, sealed: Path) -> None:
    listed = json.loads((sealed / "manifest.json").read_bytes())["shards"]
    entry = file_entry(tabled, manifest.TABLE_NAME).model_dump()
    for fields, message in [
        ({"shards": listed}, "one of the two"),
        ({"shard_table": entry | {"path": "tokenizer/tokenizer.json"}}, r"is called shards\.parquet"),
        ({"format_version": 4}, "format_version is 4"),
    ]:
        shutil.copy(tabled / "manifest.json", tabled / "kept")
        rewrite(tabled, lambda body, fields=fields: body.update(fields))
        with pytest.raises(ManifestInvalid, match=message):
            Cache.open(tabled)
        shutil.move(tabled / "kept", tabled / "manifest.json")
    rewrite(
        sealed_copy := shutil.copytree(sealed, tabled.parent / "empty"), lambda body: body.update(shards=[])
    )
    with pytest.raises(ManifestInvalid, match="one of the two"):
        Cache.open(sealed_copy)


def test_the_files_of_a_shard_follow_from_its_spec(sealed: Path) -> None:
    for shard in Cache.open(sealed).shards:
        assert tuple(name.replace("*", shard.key) for name in file_names(SPEC)) == tuple(
            file.path for file in shard.files
        )


def test_the_golden_cache_with_a_table_stays_readable_and_is_made_again_to_the_byte(
    tmp_path: Path,
) -> None:
    cache = Cache.open(GOLDEN)
    assert (verify(cache).rows, cache.manifest.format_version) == (5, 5)
    make_table.write(tmp_path / "again")
    for path in sorted(GOLDEN.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(GOLDEN)).read_bytes(), path
