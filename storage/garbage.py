"""Finds and removes what is in a store and in no cache: `stillroom gc`.

A shard is removed when no sealed cache has it, no capture has locked the store (a capture uses shards that no
cache has yet), and it is not new (a killed capture continues from its finished shards). Only bytes that no
cache links to are counted: others stay on disk.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from storage import manifest
from storage.errors import NoManifest, StoreInUse
from storage.merging import unpinned
from storage.reader import Cache
from storage.writer import LOCK, Store


class Unused(NamedTuple):
    """A shard or table of a store that no cache has."""

    path: Path
    rows: int
    bytes: int  # freed by its removal


@contextlib.contextmanager
def lock_exclusive(store: Store) -> Iterator[None]:
    """While the context lasts, no capture uses the store. Raises StoreInUse where one does now."""
    with (store.root / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUse(
                f"a capture is running that uses shards of {store.root}: wait until it has ended."
            ) from None
        yield


def unused(store: Store, caches: Path, keep_seconds: float) -> list[Unused]:
    """Shards and tables of `store` that no sealed cache below `caches` has, and that are older than
    `keep_seconds`.

    Raises NoManifest where there is no such directory, and ManifestInvalid for a cache that cannot be read:
    its shards are unknown.
    """
    if not caches.is_dir():
        raise NoManifest(f"there is no directory {caches}: run this in the root of the project.")
    named: set[str] = set()
    for found in sorted([*caches.glob("*/manifest.json"), *caches.glob("*/*/manifest.json")]):  # and mixtures
        sealed = manifest.load(found.parent)
        if sealed.shard_table is not None:
            sealed = Cache.open(found.parent).manifest
        own, first = sealed.identity.fingerprint, unpinned(sealed.identity).fingerprint
        named |= {f"{own}/{shard.key}" for shard in sealed.every_shard} | {
            f"ranks/{first}.json",
            f"bases/{first}",
        }
    before = time.time() - keep_seconds
    candidates = [
        *store.root.glob(f"{'[0-9a-f]' * 64}/*"),
        *store.root.glob("ranks/*"),
        *store.root.glob("bases/*"),
    ]
    return [
        _described(path)
        for path in sorted(candidates)
        if path.relative_to(store.root).as_posix() not in named and _changed(path) < before
    ]


def remove(store: Store, found: Sequence[Unused]) -> None:
    """Remove these, each in one step, and what killed writers have left."""
    for item in found:
        aside = store.aside_name()
        aside.parent.mkdir(exist_ok=True)
        os.rename(item.path, aside)
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        with contextlib.suppress(OSError):  # not empty
            item.path.parent.rmdir()
    store.sweep()


def _changed(path: Path) -> float:
    meta = path / "shard.json"
    return (meta if meta.is_file() else path).stat().st_mtime


def _described(path: Path) -> Unused:
    files = [file.stat() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    rows = 0
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # damaged ones are removed like others
        rows = int(json.loads((path / "shard.json").read_bytes())["entry"]["rows"])
    return Unused(path, rows, sum(file.st_size for file in files if file.st_nlink == 1))
