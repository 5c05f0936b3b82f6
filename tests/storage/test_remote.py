"""A cache on a bucket: read through local copies, each checked once; errors name the URL.

Everything talks to a real S3 server (tests/s3.py) through s3fs.
"""

import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from storage import Cache, manifest
from storage.errors import (
    ConfigError,
    ManifestInvalid,
    NoManifest,
    ShardCorrupt,
    ShardMissing,
    ShardTruncated,
    StoreUnreachable,
)
from storage.verify import verify
from tests import s3 as server
from tests.s3 import Server


@pytest.fixture
def url(s3: Server, sealed: Path, request: pytest.FixtureRequest) -> str:
    """The URL of a copy of the sealed cache that the test may damage."""
    return server.upload(sealed, f"caches/{abs(hash(request.node.nodeid))}")


def change(url: str, path: str, content: bytes | None) -> None:
    """Replace an object, or remove it."""
    from s3fs import S3FileSystem

    where = f"{url}/{path}"
    S3FileSystem().rm_file(where) if content is None else S3FileSystem().pipe_file(where, content)


def test_a_cache_on_a_bucket_says_what_its_copy_on_disk_says(url: str, sealed: Path, tmp_path: Path) -> None:
    near, there = Cache.open(sealed), Cache.open(url, local=tmp_path / "near")
    assert not (tmp_path / "near").exists(), "opening looks at the manifest alone"
    assert verify(there) == verify(near)
    assert there.manifest_sha256 == near.manifest_sha256
    for shard in near.shards:
        assert np.array_equal(there.read(shard).logits, near.read(shard).logits)
        assert np.array_equal(there.hidden(shard, "layer.1"), near.hidden(shard, "layer.1"))
    names = [path.name for path in sorted(sealed.joinpath("tokenizer").iterdir())]
    assert [path.name for path in sorted(there.tokenizer_dir.iterdir())] == names


def test_what_is_near_by_is_read_without_the_bucket(url: str, tmp_path: Path) -> None:
    first = Cache.open(url, local=tmp_path)
    rows = first.read(first.shards[0])
    path = first.shards[0].logits_path
    change(url, path, None)
    again = Cache.open(url, local=tmp_path)
    assert np.array_equal(again.read(again.shards[0]).logits, rows.logits)
    other = Cache.open(url, local=tmp_path / "other")
    with pytest.raises(ShardMissing, match=f"{url}/{path} is missing"):
        other.read(other.shards[0])


def test_a_copy_that_was_damaged_near_by_is_fetched_again(url: str, tmp_path: Path) -> None:
    cache = Cache.open(url, local=tmp_path)
    rows = cache.read(cache.shards[0])
    (copy,) = tmp_path.rglob(f"*/{cache.shards[0].logits_path}")
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    again = Cache.open(url, local=tmp_path)
    assert np.array_equal(again.read(again.shards[0]).logits, rows.logits)


@pytest.mark.parametrize("kind", ["logits", "hidden", "tokenizer"])
def test_an_object_that_is_missing_cut_grown_or_another_is_named_and_never_read(
    url: str, sealed: Path, kind: str, tmp_path: Path
) -> None:
    cache = Cache.open(url, local=tmp_path)
    shard = cache.shards[1]
    path, use = {
        "logits": (shard.logits_path, lambda: cache.read(shard)),
        "hidden": (f"{shard.hidden_path}/layer.1/c.0.0", lambda: cache.hidden(shard, "layer.1")),
        "tokenizer": ("tokenizer/tokenizer.json", lambda: cache.tokenizer_dir),
    }[kind]
    sound = (sealed / path).read_bytes()
    for content, error in [
        (None, ShardMissing),
        (sound[:-1], ShardTruncated),
        (sound + b"x", ShardTruncated),
        (bytes([sound[0] ^ 1]) + sound[1:], ShardCorrupt),
    ]:
        change(url, path, content)
        with pytest.raises(error, match=f"{url}/{path}"):
            use()
        assert not any(copy.is_file() and copy.name != "lock" for copy in tmp_path.rglob("*"))
    change(url, path, sound)
    use()


def test_far_too_large_an_object_is_refused_before_it_is_on_disk(url: str, tmp_path: Path) -> None:
    cache = Cache.open(url, local=tmp_path)
    path = cache.shards[0].logits_path
    change(url, path, bytes(2**23))
    with pytest.raises(ShardTruncated, match=r"has 8,388,608 bytes or more"):
        cache.read(cache.shards[0])


def test_no_manifest_and_a_damaged_one_are_refused_by_url(url: str, sealed: Path, tmp_path: Path) -> None:
    with pytest.raises(NoManifest, match="there is no cache at s3://shelf/nowhere"):
        Cache.open("s3://shelf/nowhere", local=tmp_path)
    sound = (sealed / manifest.MANIFEST_NAME).read_bytes()
    for damaged in (b"", sound[:-2], sound.replace(b'"rows":5', b'"rows":6')):
        change(url, manifest.MANIFEST_NAME, damaged)
        with pytest.raises(ManifestInvalid, match=rf"{url}/manifest\.json"):
            Cache.open(url, local=tmp_path)


def test_a_manifest_without_end_is_refused_before_it_is_read(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(ShardTruncated, match="at most 100 were expected"):
        Cache.open(url, local=tmp_path)


def test_a_server_that_goes_away_is_one_clear_error_and_what_is_near_by_stays(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Server(tmp_path / "log")
    try:
        own.use(monkeypatch)
        url = server.upload(sealed, "toy")
        cache = Cache.open(url, local=tmp_path / "near")
        cache.read(cache.shards[0])
    finally:
        own.stop()
    with pytest.raises(StoreUnreachable, match=f"{url}/{cache.shards[1].logits_path} could not be read"):
        cache.read(cache.shards[1])
    assert cache.read(cache.shards[0]).row_ids
    with pytest.raises(StoreUnreachable, match=r"could not be read: EndpointConnectionError"):
        Cache.open(url, local=tmp_path / "near")


def test_a_server_that_answers_with_errors_alone_is_asked_a_bounded_number_of_times(
    tmp_path: Path, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as broken:
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{broken.server_port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        server.forget_others(endpoint)
        with pytest.raises(StoreUnreachable, match=r"s3://shelf/toy/manifest\.json could not be read"):
            Cache.open("s3://shelf/toy", local=tmp_path)
        broken.shutdown()
    assert 1 <= len(asked) <= 30


def test_a_bucket_that_is_not_there_is_told_like_a_cache_that_is_not_there(
    s3: Server, tmp_path: Path
) -> None:
    with pytest.raises(NoManifest, match="there is no cache at s3://other/toy"):
        Cache.open("s3://other/toy", local=tmp_path)


def test_a_url_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nonsense://bucket/toy cannot be used"):
        Cache.open("nonsense://bucket/toy", local=tmp_path)


def test_a_file_url_is_a_local_path(sealed: Path) -> None:
    assert Cache.open(f"file://{sealed}").path == sealed


def test_a_limit_without_room_for_a_shard_is_refused_when_the_cache_is_opened(
    url: str, sealed: Path, tmp_path: Path
) -> None:
    cache = Cache.open(url, local=tmp_path)
    largest = max(sum(f.bytes for f in s.files if f.path != s.logits_path) for s in cache.shards)
    needed = largest + sum(file.bytes for file in cache.manifest.tokenizer_files)
    with pytest.raises(ConfigError, match=rf"too few for {url}.* have {needed:,}"):
        Cache.open(url, local=tmp_path, limit_bytes=needed - 1)
    small = Cache.open(url, local=tmp_path, limit_bytes=needed)
    assert small.tokenizer_dir.is_dir()
    assert verify(small) == verify(Cache.open(sealed))
