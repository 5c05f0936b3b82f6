"""The store: finished shards, each in a directory named by its content.

    <store>/<identity fingerprint>/<shard key>/shard.json          its manifest entry, and seconds
                                              /logits/<key>.parquet
                                              /hidden/<key>/...
    <store>/ranks/<identity fingerprint>.json      frequent ids, for compact layouts
    <store>/bases/<identity fingerprint>/...       mean and axes, for hidden states as principal components
    <store>/in-use                                 locked by captures that take shards from here
    <store>/tmp/                                   unfinished files, swept when their writer has died

A shard is written in tmp/, flushed to disk and renamed, so it is there whole or not at all, even if several
processes write it. storage/seal.py links finished shards into a cache.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import hidden, manifest, records
from storage.checksums import check_files, file_entries
from storage.compact import Columns
from storage.disk import disk_full_explained, fsync, fsync_tree, host_name, sweep_stale
from storage.errors import CacheError, ManifestInvalid
from storage.fingerprints import canonical_json, sha256_json
from storage.manifest import ShardEntry
from storage.spec import Identity, shard_key

RANKS_FORMAT = "stillroom-ranks"
LOCK = "in-use"  # a file of the store: captures have shared locks on it, a clean-up an exclusive one


class StoredShard(NamedTuple):
    """A finished shard in a store."""

    root: Path  # the directory that its entry's paths are relative to
    entry: ShardEntry
    seconds: float  # of the teacher's computation

    def row_ids(self) -> pa.StringArray:
        """The ids of its rows, in order."""
        return records.read_columns(self.root / self.entry.logits_path, "row_id")[0]


class Store:
    """The finished shards below `root`. Any number of processes may use one store at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tmp = root / "tmp"

    def lock_shared(self) -> None:
        """Keep clean-ups away from the store for as long as this object lives.

        Any number of processes share the lock, and a killed process loses it. Waits for a running clean-up.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_SH)

    def finished(self, identity: Identity) -> list[StoredShard]:
        """Every sound shard of `identity`, largest first. Damaged ones are removed."""
        found = []
        for meta in sorted((self.root / identity.fingerprint).glob("*/shard.json")):
            try:
                shard = _stored(meta.parent)
            except (CacheError, ValueError, KeyError, TypeError):
                shutil.rmtree(meta.parent)  # shards are renamed into place whole: not unfinished, damaged
            else:
                found.append(shard)
        return sorted(found, key=lambda shard: (-shard.entry.rows, shard.entry.key))

    def shard(self, identity: Identity, key: str) -> StoredShard | None:
        """The finished shard of this key, or None. Raises CacheError where it is damaged."""
        root = self.root / identity.fingerprint / key
        return _stored(root) if root.is_dir() else None

    def put(
        self,
        identity: Identity,
        rows: records.LogitRows | records.EntryRows,
        states: Mapping[str, npt.NDArray[np.float32]],
        seconds: float,
        packed: Columns | None = None,
    ) -> StoredShard:
        """Write one finished shard. `packed`: see records.write_sparse.

        Raises StoreFull where the disk is full; earlier shards stay.
        """
        row_ids, inputs = rows.row_ids.to_pylist(), rows.input_hashes.to_pylist()
        key = shard_key(identity, row_ids, inputs)

        def write(aside: Path) -> ShardEntry:
            (aside / "logits").mkdir()
            path, spec = aside / "logits" / f"{key}.parquet", identity.spec
            if isinstance(rows, records.LogitRows):
                records.write(path, rows, spec.labels, spec.column)
            elif spec.sparse is not None:
                records.write_sparse(path, rows, spec.sparse, spec.labels, packed)
            if identity.spec.hidden is not None:
                hidden.write(aside / "hidden" / key, states, identity.spec.hidden)
            return ShardEntry(
                key=key,
                rows=len(row_ids),
                positions=int(rows.num_tokens.sum()),
                inputs=sha256_json(inputs),
                files=file_entries(aside),
            )

        return self.add(identity, key, seconds, write)

    def add(
        self, identity: Identity, key: str, seconds: float, write: Callable[[Path], ShardEntry]
    ) -> StoredShard:
        """Add a shard whose files `write` puts into a directory; return the one in the store, perhaps another
        worker's. Raises StoreFull.
        """
        final = self.root / identity.fingerprint / key
        with self._aside() as aside, disk_full_explained(self.root):
            entry = write(aside)
            body = {"entry": entry.model_dump(mode="json"), "seconds": round(seconds, 3)}
            (aside / "shard.json").write_bytes(canonical_json(body))
            fsync_tree(aside)
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(aside, final)
            except OSError:
                if not final.is_dir():
                    raise
                # Another worker finished the same shard first: with the same bytes.
                entry = ShardEntry.model_validate(json.loads((final / "shard.json").read_bytes())["entry"])
            fsync(final.parent)
        return StoredShard(final, entry, seconds)

    def fetch(self, identity: Identity, keys: Iterable[str]) -> None:
        """Copy shards of other machines into the store. A local store has no others."""

    def ranks(self, identity: Identity) -> npt.NDArray[np.int64] | None:
        """The table of frequent ids that captures of this identity share; None before the first one.

        Raises ManifestInvalid where it is damaged: with another table no finished shard would fit.
        """
        path = self._ranks_path(identity)
        if not path.is_file():
            return None
        raw, again = path.read_bytes(), "Remove it: the same first rows give the same table again."
        if raw.startswith(b"["):  # written before tables had checksums
            try:
                return np.array(json.loads(raw), np.int64)
            except ValueError as error:
                raise ManifestInvalid(f"{path} is not a table of ids: {error}.\n{again}") from None
        return np.array(manifest.open_checksummed(raw, path, RANKS_FORMAT, again)["ranks"], np.int64)

    def keep_ranks(self, identity: Identity, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Store the table of frequent ids; return the stored one, perhaps another worker's."""
        path = self._ranks_path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._aside() as aside, disk_full_explained(self.root):
            body = {"format": RANKS_FORMAT, "ranks": ranks.tolist()}
            (aside / path.name).write_bytes(manifest.checksummed(body))
            fsync(aside / path.name)
            os.replace(aside / path.name, path)
        kept = Store.ranks(self, identity)  # the local one, also where a subclass shares it
        assert kept is not None
        return kept

    def basis(self, identity: Identity) -> Path | None:
        """The directory of the bases that captures of this identity share (storage.hidden.read_bases), or
        None.
        """
        path = self.root / "bases" / identity.fingerprint
        return path if path.is_dir() else None

    def keep_basis(self, identity: Identity, bases: Mapping[str, hidden.Basis]) -> Path:
        """Store these bases; return the directory of the stored ones, perhaps another worker's."""
        path = self.root / "bases" / identity.fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._aside() as aside, disk_full_explained(self.root):
            hidden.write_bases(aside / "basis", bases)
            fsync_tree(aside)
            try:
                os.rename(aside / "basis", path)
            except OSError:
                if not path.is_dir():
                    raise
        return path

    def _ranks_path(self, identity: Identity) -> Path:
        return self.root / "ranks" / f"{identity.fingerprint}.json"

    def sweep(self) -> None:
        """Remove what killed writers have left: their process has ended, or it is a day old."""
        for aside in self._tmp.glob("*"):
            host, pid, *_ = [*aside.name.split("."), ""]
            sweep_stale(aside, host, pid)

    def aside_name(self) -> Path:
        """A path below tmp/ that no other process uses."""
        return self._tmp / f"{host_name()}.{os.getpid()}.{uuid.uuid4().hex}"

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Path]:
        aside = self.aside_name()
        with disk_full_explained(self.root):
            aside.mkdir(parents=True)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _stored(root: Path) -> StoredShard:
    """The shard in a directory of a store, its files checked."""
    body = json.loads((root / "shard.json").read_bytes())
    shard = StoredShard(root, ShardEntry.model_validate(body["entry"]), float(body["seconds"]))
    check_files(shard.root, shard.entry.files)
    return shard
