"""A cache is published to a bucket and received elsewhere: the digest of its manifest determines it."""

from pathlib import Path

import pytest

from storage import Cache
from storage.errors import ManifestInvalid, ShardCorrupt, SpecMismatch
from storage.fingerprints import canonical_json
from storage.location import Url
from storage.mixture import open_cache
from storage.received import RECEIVED_NAME, open_received, publish, receive
from storage.seal import SealedParts, seal
from storage.verify import verify
from storage.writer import Store
from tests import s3 as server
from tests.s3 import Server
from tests.storage.conftest import IDENTITY, fill


@pytest.fixture
def url(s3: Server, tmp_path: Path) -> Url:
    """A URL with no object yet."""
    return Url(f"s3://{server.BUCKET}/{tmp_path.name}/toy")


@pytest.fixture
def received(sealed: Path, url: Url, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that represents the published cache."""
    monkeypatch.chdir(tmp_path)  # copies come to .stillroom below it
    receive(tmp_path / "caches" / "toy", str(url), publish(sealed, url).manifest_sha256)
    return tmp_path / "caches" / "toy"


def test_what_is_published_is_received_as_one_small_file(received: Path, sealed: Path) -> None:
    assert [path.name for path in received.iterdir()] == [RECEIVED_NAME]
    there = open_cache(received)
    assert there.manifest_sha256 == Cache.open(sealed).manifest_sha256
    assert verify(there) == verify(Cache.open(sealed))
    assert not list(received.parent.glob(".toy*"))


def test_a_grown_cache_is_published_without_what_is_there_and_the_old_digest_is_refused(
    received: Path, url: Url, tmp_path: Path, s3: Server
) -> None:
    old = open_cache(received)
    shards = fill(Store(tmp_path / "store"), (5, 3, 4))
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    seal(tmp_path / "grown" / "toy", SealedParts(IDENTITY, shards, files, {"teacher": "toy"}))
    before, sent = len(s3.log.read_text()), list[int]()
    grown = publish(tmp_path / "grown" / "toy", url, sent.append)
    written = [line.split()[6] for line in s3.log.read_text()[before:].splitlines() if '"PUT ' in line]
    new = {file.path for file in grown.shards[2].files}
    key = f"/{server.BUCKET}/{tmp_path.name}/toy/"
    assert [path.removeprefix(key) for path in written] == [*sorted(new), "manifest.json"]
    assert sum(sent) == sum(file.bytes for file in grown.manifest.files)
    assert len(old.read(old.shards[0]).row_ids) == 5, "an open cache has the old manifest"
    with pytest.raises(SpecMismatch, match=f"write manifest: {grown.manifest_sha256}"):
        open_cache(received)


def test_a_damaged_cache_is_not_published(cache: Cache, url: Url) -> None:
    path = cache.path / cache.shards[1].logits_path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ShardCorrupt, match=path.name):
        publish(cache.path, url)
    assert not [name for name in server.objects(url.parent.name) if name.endswith("manifest.json")]


def test_another_cache_than_the_one_that_is_named_is_not_received(
    sealed: Path, url: Url, tmp_path: Path
) -> None:
    publish(sealed, url)
    with pytest.raises(SpecMismatch, match=r"has another cache than received\.toy"):
        receive(tmp_path / "toy", str(url), "0" * 64)
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize(
    "change",
    [{"url": "/etc/passwd"}, {"manifest": "1"}, {"more": 1}, {"format_version": 2}, None],
    ids=range(5),
)
def test_a_file_that_does_not_say_where_a_cache_is_is_refused(tmp_path: Path, change: dict | None) -> None:
    body = {"format": "stillroom-remote", "format_version": 1, "url": "s3://b/c", "manifest": "1" * 64}
    raw = canonical_json(body | change) if change else b"{"
    (tmp_path / RECEIVED_NAME).write_bytes(raw)
    with pytest.raises(ManifestInvalid, match=r"remote\.json does not name the URL of a cache"):
        open_received(tmp_path)
