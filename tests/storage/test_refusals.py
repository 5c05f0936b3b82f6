"""A cache that is damaged or does not fit is refused, by name, and never read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from storage import Cache
from storage.errors import (
    CacheError,
    FormatTooNew,
    ManifestInvalid,
    NoManifest,
    ShardCorrupt,
    ShardMissing,
    ShardTruncated,
    ShardUnexpected,
    SpecMismatch,
)
from storage.fingerprints import canonical_json, row_id, sha256_json
from storage.manifest import MANIFEST_NAME
from storage.verify import verify
from tests.storage.conftest import IDENTITY, LABELS


def read_all(path: Path) -> None:
    """What a careful user does with a cache before training."""
    verify(Cache.open(path))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as a forger would: with a right checksum, in canonical form."""
    body = json.loads((path / MANIFEST_NAME).read_bytes())
    body.pop("checksum")
    change(body)
    (path / MANIFEST_NAME).write_bytes(canonical_json({**body, "checksum": sha256_json(body)}) + b"\n")


def test_a_sound_cache_is_read_to_the_last_byte(sealed: Path) -> None:
    counts = verify(Cache.open(sealed))
    assert (counts.rows, counts.shards, counts.positions) == (8, 2, 16)
    assert (
        counts.bytes
        == sum(p.stat().st_size for p in sealed.rglob("*") if p.is_file())
        - (sealed / MANIFEST_NAME).stat().st_size
    )


@pytest.mark.parametrize("kind", ["logits", "c.0.0", "zarr.json", "tokenizer.json"])
def test_a_missing_or_cut_or_grown_file_is_refused_when_the_cache_is_opened(cache: Cache, kind: str) -> None:
    path = next(p for p in sorted(cache.path.rglob("*")) if p.is_file() and kind in p.as_posix())
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    with pytest.raises(ShardTruncated, match=rf"has {len(sound) - 1:,} bytes; {len(sound):,} were sealed"):
        Cache.open(cache.path)
    path.write_bytes(sound + b"x")
    with pytest.raises(ShardTruncated):
        Cache.open(cache.path)
    path.unlink()
    with pytest.raises(ShardMissing, match=path.name):
        Cache.open(cache.path)


def test_a_file_that_was_read_once_is_not_taken_for_another_caches(cache: Cache) -> None:
    shard = cache.shards[0]
    cache.read(shard)
    path = cache.path / shard.logits_path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ShardCorrupt):
        Cache.open(cache.path).read(shard)


def test_a_stray_file_is_refused_by_verify(cache: Cache) -> None:
    (cache.path / "logits" / "extra.parquet").write_bytes(b"x")
    with pytest.raises(ShardUnexpected, match=r"extra\.parquet"):
        read_all(cache.path)


def test_no_cache_and_no_manifest_are_told_apart_and_say_what_to_do(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(NoManifest, match=r"(?s)there is no cache at .*dvc pull"):
        Cache.open(tmp_path / "nowhere")
    (cache.path / MANIFEST_NAME).unlink()
    with pytest.raises(NoManifest, match="never sealed"):
        Cache.open(cache.path)


def test_a_newer_format_is_refused_with_both_versions(cache: Cache) -> None:
    rewrite(cache.path, lambda body: body.update(format_version=6, something_new=[1]))
    with pytest.raises(FormatTooNew, match=r"format version 6; this Stillroom reads up to 5"):
        Cache.open(cache.path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'{"format": "other"}',
        b'{"format": NaN}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'"x"',
    ],
    ids=range(9),
)
def test_a_manifest_that_is_no_manifest_is_refused(cache: Cache, raw: bytes) -> None:
    (cache.path / MANIFEST_NAME).write_bytes(raw)
    with pytest.raises(ManifestInvalid):
        Cache.open(cache.path)


def hostile(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one field of the first shard's first file, or of the shard itself."""

    def change(body: dict[str, Any]) -> None:
        shard = body["shards"][0]
        (shard["files"][0] if field in ("path", "bytes", "sha256") else shard)[field] = value

    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("path", "../../etc/passwd"),
        ("path", "/etc/passwd"),
        ("path", "logits/../../x"),
        ("path", "logits//x"),
        ("path", "other.parquet"),
        ("bytes", -1),
        ("bytes", 2**60),
        ("bytes", 1.5),
        ("bytes", "7"),
        ("bytes", True),
        ("sha256", "0"),
        ("rows", 0),
        ("rows", 10**30),
        ("positions", None),
        ("key", "../x"),
        ("files", []),
        ("surprise", 1),
    ],
)
def test_a_hostile_manifest_is_refused_before_anything_is_read(cache: Cache, field: str, value: Any) -> None:
    rewrite(cache.path, hostile(field, value))
    with pytest.raises(ManifestInvalid):
        Cache.open(cache.path)


def test_a_manifest_in_another_form_is_refused_though_it_says_the_same(cache: Cache) -> None:
    path = cache.path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=1))
    with pytest.raises(ManifestInvalid, match="canonical"):
        Cache.open(cache.path)


def test_a_shard_listed_twice_is_refused(cache: Cache) -> None:
    rewrite(cache.path, lambda body: body["shards"].append(body["shards"][0]))
    with pytest.raises(ManifestInvalid, match="listed twice"):
        Cache.open(cache.path)


def test_counts_that_do_not_match_the_shard_are_refused(cache: Cache) -> None:
    rewrite(cache.path, hostile("rows", 6))
    with pytest.raises(ShardCorrupt, match="not the shard in the manifest"):
        read_all(cache.path)


def test_rows_that_are_not_those_of_the_named_dataset_are_refused(cache: Cache) -> None:
    rewrite(cache.path, lambda body: body.update(dataset="0" * 64))
    with pytest.raises(ShardCorrupt, match="not those of its manifest"):
        read_all(cache.path)


CHANGES = {
    "another tokenizer": (
        {"tokenizer": {"content": "9" * 64, "vocab_size": 7}},
        ["tokenizer.content", "tokenizer.vocab_size"],
    ),
    "another padding side": ({"tokenizer": {"padding_side": "left"}}, ["tokenizer.padding_side"]),
    "another teacher": ({"teacher": {"weights": "9" * 64}}, ["teacher.weights"]),
    "another config": ({"teacher": {"config": "9" * 64}}, ["teacher.config"]),
    "another length": ({"spec": {"max_length": 8}}, ["spec.max_length"]),
    "other states": ({"spec": {"hidden": None}}, ["spec.hidden"]),
    "other code": ({"capture_version": 2}, ["capture_version"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_that_differs_is_listed_with_found_and_expected(cache: Cache, name: str) -> None:
    changes, fields = CHANGES[name]
    body = IDENTITY.model_dump()
    for key, value in changes.items():
        body[key] = {**body[key], **value} if isinstance(value, dict) else value
    other = type(IDENTITY).model_validate(body)
    with pytest.raises(SpecMismatch) as refusal:
        cache.check("the test", identity=other, advice="Do this.")
    assert [fault.field for fault in refusal.value.mismatches] == fields
    message = str(refusal.value)
    assert f"does not fit the test ({len(fields)} field" in message
    assert all(word in message for word in ("found", "expected", "Do this.", *fields))


def test_reordered_labels_are_refused_with_both_orders(cache: Cache) -> None:
    cache.check("the test", labels=LABELS)
    with pytest.raises(SpecMismatch, match=r"dataset\.labels +\[bad, fair, good\] +\[good, fair, bad\]"):
        cache.check("the test", labels=LABELS[::-1])


def test_a_changed_row_is_refused_and_named(cache: Cache) -> None:
    rows = cache.row_ids().to_pylist()
    changed = row_id("toy", "text 3, mended")
    wanted = pa.array([changed if row == row_id("toy", "text 3") else row for row in rows])
    with pytest.raises(SpecMismatch, match=changed) as refusal:
        cache.check("the test", row_ids=wanted)
    assert refusal.value.mismatches[0][1:] == (7, 8)


def test_a_cache_with_more_rows_than_the_dataset_serves_it_but_is_not_the_whole_of_it(cache: Cache) -> None:
    some = cache.row_ids().slice(0, 3)
    cache.check("the test", row_ids=some)
    with pytest.raises(SpecMismatch, match=r"dataset\.content"):
        cache.check("the test", row_ids=some, whole=True)


def test_every_refusal_is_a_cache_error_and_a_builtin_one() -> None:
    builtins = {
        NoManifest: FileNotFoundError,
        ManifestInvalid: ValueError,
        ShardTruncated: OSError,
    }
    for error, builtin in builtins.items():
        assert issubclass(error, CacheError)
        assert issubclass(error, builtin)
