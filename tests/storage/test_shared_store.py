"""Shards that several machines share on a bucket: whole or not there, the first one stays, nothing is listed.

Machines are directories here; the bucket is on a real S3 server (tests/s3.py).
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from storage import hidden, records
from storage.errors import StoreUnreachable
from storage.fingerprints import canonical_json, sha256_json
from storage.location import Url
from storage.seal import SealedParts, seal
from storage.shared_store import SharedStore, open_store
from storage.writer import Store, StoredShard
from tests import s3 as server
from tests.s3 import Server
from tests.storage.conftest import IDENTITY, fill, make_rows, make_states
from tests.storage.test_store import digest_tree

Machine = Callable[[str], SharedStore]


@pytest.fixture
def machine(s3: Server, tmp_path: Path) -> Machine:
    """Makes the store of a machine of this name; all of them share one URL."""
    return lambda name: SharedStore(tmp_path / name, Url(f"s3://{server.BUCKET}/{tmp_path.name}"))


def put(store: Store, rows: records.LogitRows) -> StoredShard:
    return store.put(IDENTITY, rows, make_states(rows), 1.0)


def other_bits(rows: records.LogitRows) -> records.LogitRows:
    """The same rows, as another processor rounds them."""
    return rows._replace(logits=np.nextafter(rows.logits, np.float32(9)))


def on_the_bucket(store: SharedStore, ending: str) -> tuple[str, bytes]:
    """The path of the only such object, with its bytes."""
    (found,) = (
        item for item in server.objects(f"{store.objects.url.name}/").items() if item[0].endswith(ending)
    )
    return f"{server.BUCKET}/{found[0]}", found[1]


def test_a_shard_that_one_machine_finished_is_there_for_another_and_seals_the_same_bytes(
    machine: Machine, tmp_path: Path
) -> None:
    one, two = machine("one"), machine("two")
    shards = fill(one)
    two.fetch(IDENTITY, [shard.entry.key for shard in shards] + ["0" * 64])
    found = {shard.entry.key: shard for shard in two.finished(IDENTITY)}
    seal(tmp_path / "a" / "toy", SealedParts(IDENTITY, shards, {}, {}))
    seal(tmp_path / "b" / "toy", SealedParts(IDENTITY, [found[shard.entry.key] for shard in shards], {}, {}))
    assert digest_tree(tmp_path / "a") == digest_tree(tmp_path / "b")


def test_nothing_is_ever_listed(machine: Machine, s3: Server) -> None:
    before = len(s3.log.read_text())
    fill(machine("one"))
    machine("two").fetch(IDENTITY, [shard.entry.key for shard in machine("one").finished(IDENTITY)])
    log = s3.log.read_text()[before:]
    assert "PUT" in log
    assert "GET" in log
    assert "list-type" not in log


def test_of_two_machines_that_finish_a_shard_the_first_one_s_bytes_stay(
    machine: Machine, tmp_path: Path
) -> None:
    one, two, rows = machine("one"), machine("two"), make_rows(0, 5)
    first, second = put(one, rows), put(two, other_bits(rows))
    assert second.entry == first.entry
    assert second.root.is_relative_to(tmp_path / "two")
    assert digest_tree(second.root) == digest_tree(first.root)
    assert two.finished(IDENTITY) == [second]


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "no record", "record"])
def test_a_shard_that_is_damaged_on_the_bucket_is_not_taken_and_its_next_writer_replaces_it(
    machine: Machine, damage: str
) -> None:
    from s3fs import S3FileSystem

    one, rows = machine("one"), make_rows(0, 5)
    key = put(one, rows).entry.key
    path, held = on_the_bucket(one, "shard.json" if "record" in damage else ".parquet")
    if damage in ("missing", "no record"):
        S3FileSystem().rm_file(path)
    else:
        S3FileSystem().pipe_file(path, held[:-1] if damage == "cut" else held[:-9] + b"?" + held[-8:])
    two, three = machine("two"), machine("three")
    two.fetch(IDENTITY, [key])
    assert two.finished(IDENTITY) == []
    put(two, other_bits(rows))
    three.fetch(IDENTITY, [key])
    (replaced,) = three.finished(IDENTITY)
    assert digest_tree(replaced.root) == digest_tree(two.finished(IDENTITY)[0].root)


def test_a_shard_with_files_that_are_not_its_own_is_not_taken(machine: Machine) -> None:
    from s3fs import S3FileSystem

    one = machine("one")
    shard = put(one, make_rows(0, 5))
    record, held = on_the_bucket(one, "shard.json")
    files, body = json.loads(held)["entry"]["files"], json.loads(held)
    stray = {"path": "shard.json", "bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    body["entry"]["files"] = [*files, stray]
    offer = f"{record.removesuffix('/shard.json')}/{sha256_json(body)[:16]}"
    for file in files:
        S3FileSystem().pipe_file(f"{offer}/{file['path']}", (shard.root / file["path"]).read_bytes())
    S3FileSystem().pipe_file(f"{offer}/shard.json", b"x")
    S3FileSystem().pipe_file(record, canonical_json(body))
    two = machine("two")
    two.fetch(IDENTITY, [shard.entry.key])
    assert not list(two.root.glob("*/*/shard.json"))


def test_what_could_not_be_offered_is_kept_and_offered_by_the_next_capture(
    machine: Machine, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = SharedStore(tmp_path / "one", Url("s3://no-such-bucket/store"))
    with pytest.raises(StoreUnreachable, match=r"s3://no-such-bucket/store/.* could not be written"):
        put(nowhere, make_rows(0, 5))
    (kept,) = Store(tmp_path / "one").finished(IDENTITY)
    machine("one").fetch(IDENTITY, [])
    shutil.rmtree(tmp_path / "one")
    machine("one").fetch(IDENTITY, [kept.entry.key])
    assert machine("one").finished(IDENTITY) == [kept]


def test_frequent_ids_and_bases_are_those_of_the_first_machine(machine: Machine) -> None:
    one, two = machine("one"), machine("two")
    assert one.ranks(IDENTITY) is None
    assert one.basis(IDENTITY) is None
    assert one.keep_ranks(IDENTITY, np.array([3, 1])).tolist() == [3, 1]
    assert two.keep_ranks(IDENTITY, np.array([1, 3])).tolist() == [3, 1]
    assert two.ranks(IDENTITY).tolist() == [3, 1]
    bases = [
        {"layer.1": hidden.Basis(np.full(4, n, np.float32), np.eye(4, dtype=np.float32))} for n in (1, 2)
    ]
    kept = one.keep_basis(IDENTITY, bases[0])
    assert digest_tree(two.keep_basis(IDENTITY, bases[1])) == digest_tree(kept)
    assert digest_tree(machine("three").basis(IDENTITY)) == digest_tree(kept)


def test_a_store_is_here_at_a_path_or_at_a_url(s3: Server, tmp_path: Path) -> None:
    assert open_store(tmp_path, None).root == tmp_path
    assert open_store(tmp_path, str(tmp_path / "nfs")).root == tmp_path / "nfs"
    shared = open_store(tmp_path, "s3://shelf/store/")
    assert isinstance(shared, SharedStore)
    assert (shared.root, str(shared.objects.url)) == (tmp_path, "s3://shelf/store")
