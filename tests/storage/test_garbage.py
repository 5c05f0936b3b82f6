"""What no cache names is found and removed, and nothing that a cache or a running capture needs."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from storage import Cache
from storage.errors import ManifestInvalid, NoManifest, StoreInUse
from storage.garbage import lock_exclusive, remove, unused
from storage.manifest import MANIFEST_NAME
from storage.mixture import mix
from storage.seal import SealedParts, seal
from storage.verify import verify
from storage.writer import Store, StoredShard
from tests.storage.conftest import IDENTITY, fill

DAY = 24 * 3600.0
OTHER = IDENTITY.model_copy(update={"capture_version": 2})


def aged(shard: StoredShard) -> StoredShard:
    """Two days old."""
    os.utime(shard.root / "shard.json", (time.time() - 2 * DAY,) * 2)
    return shard


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of three old shards, of which caches/toy names two."""
    made = Store(tmp_path / "store")
    shards = [aged(shard) for shard in fill(made, (5, 3, 4))]
    seal(tmp_path / "caches" / "toy", SealedParts(IDENTITY, shards[:2], {}, {}))
    return made


def found(store: Store) -> list[tuple[str, int]]:
    """The names and rows of what may go."""
    return [(item.path.name, item.rows) for item in unused(store, store.root.parent / "caches", DAY)]


def test_what_no_cache_names_is_removed_and_the_rest_stays_to_the_byte(store: Store) -> None:
    before = store.finished(IDENTITY)
    (rows,) = found(store)
    assert rows[1] == 4
    (item,) = unused(store, store.root.parent / "caches", DAY)
    assert item.bytes == sum(file.stat().st_size for file in item.path.rglob("*") if file.is_file())
    remove(store, [item])
    assert store.finished(IDENTITY) == [shard for shard in before if shard.entry.key != rows[0]]
    assert verify(Cache.open(store.root.parent / "caches" / "toy")).rows == 8
    assert found(store) == []


def test_what_was_made_today_stays(store: Store) -> None:
    (_, _, third) = sorted(store.finished(IDENTITY), key=lambda shard: shard.root.stat().st_mtime)
    names = [name for name, _ in found(store)]
    os.utime(store.root / IDENTITY.fingerprint / names[0] / "shard.json")
    assert found(store) == []
    assert third.root.is_dir()


def test_bytes_that_a_cache_still_holds_are_not_counted(store: Store) -> None:
    path = store.root.parent / "caches" / "toy" / MANIFEST_NAME
    path.unlink()  # its files are links to the store's
    by_rows = {item.rows: item.bytes for item in unused(store, store.root.parent / "caches", DAY)}
    assert set(by_rows) == {5, 3, 4}
    assert by_rows[4] > by_rows[5]


def test_shards_of_a_mixture_are_named(store: Store) -> None:
    caches = store.root.parent / "caches"
    ((name, _),) = found(store)
    third = next(shard for shard in store.finished(IDENTITY) if shard.entry.key == name)
    cache = Cache.open(caches / "toy")
    seal(store.root.parent / "more", SealedParts(IDENTITY, [third], {}, {}))
    mix(caches / "both", {"toy": (cache, 1.0), "more": (Cache.open(store.root.parent / "more"), 1.0)}, "skip")
    assert found(store) == []


def test_tables_go_with_the_last_cache_that_was_made_with_them(store: Store) -> None:
    for who in (IDENTITY, OTHER):
        store.keep_ranks(who, np.arange(3))
        os.utime(store.root / "ranks" / f"{who.fingerprint}.json", (time.time() - 2 * DAY,) * 2)
    assert f"{OTHER.fingerprint}.json" in [name for name, _ in found(store)]
    assert f"{IDENTITY.fingerprint}.json" not in [name for name, _ in found(store)]
    remove(store, unused(store, store.root.parent / "caches", DAY))
    assert store.ranks(OTHER) is None
    assert store.ranks(IDENTITY) is not None


def test_other_things_below_the_store_are_none_of_ours(store: Store) -> None:
    (store.root / "notes" / "mine").mkdir(parents=True)
    assert len(found(store)) == 1


def test_a_store_that_captures_use_is_not_locked_for_a_clean_up(store: Store) -> None:
    store.lock_shared()
    Store(store.root).lock_shared()  # captures hold it together
    with pytest.raises(StoreInUse, match="a capture is running"), lock_exclusive(store):
        raise AssertionError("it was held")


def test_who_lets_go_of_the_store_leaves_it_to_others(store: Store) -> None:
    other = Store(store.root)
    other.lock_shared()
    del other
    with lock_exclusive(store):
        pass


def test_a_cache_that_cannot_be_read_and_a_place_without_caches_are_refused(store: Store) -> None:
    caches = store.root.parent / "caches"
    (caches / "toy" / MANIFEST_NAME).write_bytes(b"{}")
    with pytest.raises(ManifestInvalid):
        found(store)
    with pytest.raises(NoManifest, match="root of the project"):
        unused(store, caches / "nowhere", DAY)
