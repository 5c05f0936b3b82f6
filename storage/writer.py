"""Finished shards, and how they become a cache.

A store is a directory of finished shards, each in a directory named by what it is made of:

    <store>/<identity fingerprint>/<shard key>/shard.json          its manifest entry, and what it cost
                                              /logits/<key>.parquet
                                              /hidden/<key>/...
    <store>/ranks/<identity fingerprint>.json      frequent ids, for compact layouts
    <store>/bases/<identity fingerprint>/...       mean and axes, for hidden states as principal components
    <store>/tmp/                                   what is being written, swept when its writer is gone

A shard is written aside, flushed to disk and renamed, so it is there whole or not at all, whoever else writes
it too.
`seal` links finished shards into a cache and writes the manifest last, in a directory that is renamed into
place.
"""

import contextlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage import hidden, manifest, records
from storage.compact import Columns
from storage.disk import DISK_FULL
from storage.disk import disk_full_explained as _disk_full_explained
from storage.errors import CacheError
from storage.manifest import FileEntry, Manifest, ShardEntry, WeightsEntry
from storage.shard_table import ShardTable
from storage.spec import Identity, canonical_json, content_fingerprint, sha256_json, shard_key
from storage.verify import check_files, file_entry

STALE_SECONDS = 24 * 3600


class StoredShard(NamedTuple):
    """A finished shard in a store."""

    root: Path  # the directory that its entry's paths are relative to
    entry: ShardEntry
    seconds: float  # what the teacher needed for it

    def row_ids(self) -> pa.StringArray:
        """The ids of its rows, in order."""
        column = pq.read_table(self.root / self.entry.logits_path, columns=["row_id"]).column(0)
        return column.combine_chunks()


class Weights(NamedTuple):
    """Weights of the teacher for a cache to carry."""

    layers: tuple[int, ...]
    write: Callable[[Path], None]  # puts config.json and model.safetensors into a directory


class Store:
    """The finished shards below `root`. Any number of processes may use one store at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tmp = root / "tmp"

    def finished(self, identity: Identity) -> list[StoredShard]:
        """Every sound shard made under `identity`, largest first. Damaged ones are removed."""
        found = []
        for meta in sorted((self.root / identity.fingerprint).glob("*/shard.json")):
            try:
                body = json.loads(meta.read_bytes())
                shard = StoredShard(
                    meta.parent, ShardEntry.model_validate(body["entry"]), float(body["seconds"])
                )
                check_files(shard.root, shard.entry.files)
            except (CacheError, ValueError, KeyError, TypeError):
                shutil.rmtree(
                    meta.parent
                )  # shards are renamed into place whole: this one is damaged, not unfinished
            else:
                found.append(shard)
        return sorted(found, key=lambda shard: (-shard.entry.rows, shard.entry.key))

    def put(
        self,
        identity: Identity,
        rows: records.LogitRows | records.EntryRows,
        states: Mapping[str, npt.NDArray[np.float32]],
        seconds: float,
        packed: Columns | None = None,
    ) -> StoredShard:
        """Write one finished shard; `packed` are its entries in the compact layout, where that is asked for.

        Raises StoreFull where the disk ends; earlier shards stay.
        """
        row_ids, inputs = rows.row_ids.to_pylist(), rows.input_hashes.to_pylist()
        key = shard_key(identity, row_ids, inputs)
        final = self.root / identity.fingerprint / key
        with self._aside() as aside, _disk_full_explained(self.root):
            (aside / "logits").mkdir()
            path, spec = aside / "logits" / f"{key}.parquet", identity.spec
            if isinstance(rows, records.LogitRows):
                records.write(path, rows, spec.labels, spec.column)
            elif spec.codec != "dense":
                records.write_sparse(path, rows, spec.codec, spec.labels, packed)
            if identity.spec.hidden is not None:
                hidden.write(aside / "hidden" / key, states, identity.spec.hidden)
            entry = ShardEntry(
                key=key,
                rows=len(row_ids),
                positions=int(rows.num_tokens.sum()),
                inputs=sha256_json(inputs),
                files=_entries(aside),
            )
            body = {"entry": entry.model_dump(mode="json"), "seconds": round(seconds, 3)}
            (aside / "shard.json").write_bytes(canonical_json(body))
            _fsync_tree(aside)
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(aside, final)
            except OSError:
                if (
                    not final.is_dir()
                ):  # else another worker finished the same shard first: its bytes are ours
                    raise
            _fsync(final.parent)
        return StoredShard(final, entry, seconds)

    def bring(self, identity: Identity, keys: Iterable[str]) -> None:
        """Have shards here that were finished elsewhere: nothing to do for a store in one place."""

    def ranks(self, identity: Identity) -> npt.NDArray[np.int64] | None:
        """The table of frequent ids that captures of this identity share, where one was kept."""
        path = self._ranks_path(identity)
        return np.array(json.loads(path.read_bytes()), np.int64) if path.is_file() else None

    def keep_ranks(self, identity: Identity, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Keep the table of frequent ids; return the one that is there now, perhaps another worker's."""
        path = self._ranks_path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._aside() as aside, _disk_full_explained(self.root):
            (aside / path.name).write_bytes(canonical_json(ranks.tolist()))
            _fsync(aside / path.name)
            os.replace(aside / path.name, path)
        return np.array(json.loads(path.read_bytes()), np.int64)

    def basis(self, identity: Identity) -> Path | None:
        """The directory of the bases that captures of this identity share (storage.hidden.read_bases)."""
        path = self.root / "bases" / identity.fingerprint
        return path if path.is_dir() else None

    def keep_basis(self, identity: Identity, bases: Mapping[str, hidden.Basis]) -> Path:
        """Keep these bases; return the directory of those that are there now, perhaps another worker's."""
        path = self.root / "bases" / identity.fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._aside() as aside, _disk_full_explained(self.root):
            hidden.write_bases(aside / "basis", bases)
            _fsync_tree(aside)
            try:
                os.rename(aside / "basis", path)
            except OSError:
                if not path.is_dir():
                    raise
        return path

    def _ranks_path(self, identity: Identity) -> Path:
        return self.root / "ranks" / f"{identity.fingerprint}.json"

    def sweep(self) -> None:
        """Remove what killed writers left behind: their process is gone, or they are a day old."""
        for aside in self._tmp.glob("*"):
            host, pid = aside.name.split(".")[0], aside.name.split(".")[1]
            stale = aside.stat().st_mtime < time.time() - STALE_SECONDS
            if stale or (host == _host() and not Path(f"/proc/{pid}").exists()):
                shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Path]:
        aside = self._tmp / f"{_host()}.{os.getpid()}.{uuid.uuid4().hex}"
        with _disk_full_explained(self.root):
            aside.mkdir(parents=True)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def seal(
    cache: Path,
    identity: Identity,
    shards: Sequence[StoredShard],
    tokenizer_files: Mapping[str, bytes],
    provenance: Mapping[str, Any],
    ranks: Sequence[int] | None = None,
    weights: Weights | None = None,
    basis: Path | None = None,
) -> Manifest:
    """Link finished shards into `cache`, in this order, and write its manifest. Replaces what was there.

    `tokenizer_files` maps a file name to its content: a student that reads with the teacher's tokenizer finds
    it in the cache; one that starts from the teacher's weights finds them there too. `basis` is the directory
    of `Store.basis`, where hidden states are principal components. The result depends on the arguments alone:
    no time, no path, no worker.
    """
    aside = cache.parent / f".{cache.name}.{_host()}.{os.getpid()}"
    for stale in cache.parent.glob(f".{cache.name}.*"):
        shutil.rmtree(stale)
    with _disk_full_explained(cache.parent):
        (aside / "tokenizer").mkdir(parents=True)
        for name, content in tokenizer_files.items():
            (aside / "tokenizer" / name).write_bytes(content)
        tokenizer = _entries(aside)
        carried = None
        if weights is not None:
            (aside / "weights").mkdir()
            weights.write(aside / "weights")
            carried = WeightsEntry(layers=weights.layers, files=_entries(aside, "weights"))
        based = None
        if basis is not None:
            for source in sorted(path for path in basis.rglob("*") if path.is_file()):
                target = aside / manifest.BASIS_DIR / source.relative_to(basis)
                target.parent.mkdir(parents=True, exist_ok=True)
                link(source, target)
            based = _entries(aside, manifest.BASIS_DIR)
        row_ids: list[str] = []
        for shard in shards:
            row_ids.extend(shard.row_ids().to_pylist())
            for file in shard.entry.files:
                target = aside / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                link(shard.root / file.path, target)
        listed, table = tuple(shard.entry for shard in shards), None
        if len(listed) > manifest.MOST_LISTED:
            ShardTable.of(identity.spec, listed).write(aside / manifest.TABLE_NAME)
            table, listed = file_entry(aside, manifest.TABLE_NAME), ()
        sealed = Manifest(
            format_version=manifest.needed_version(identity, carried, table),
            identity=identity,
            dataset=content_fingerprint(row_ids),
            shards=listed,
            shard_table=table,
            tokenizer_files=tokenizer,
            provenance=dict(provenance),
            ranks=None if ranks is None else tuple(int(rank) for rank in ranks),
            weights=carried,
            hidden_basis=based,
        )
        if table is not None:
            sealed = sealed.with_table(tuple(shard.entry for shard in shards))
        (aside / manifest.MANIFEST_NAME).write_bytes(manifest.render(sealed))
        _fsync_tree(aside)
        if cache.exists():
            shutil.rmtree(cache)
        os.rename(aside, cache)
        _fsync(cache.parent)
    return sealed


def _entries(root: Path, below: str = "") -> tuple[FileEntry, ...]:
    files = sorted(path for path in (root / below).rglob("*") if path.is_file())
    return tuple(file_entry(root, path.relative_to(root).as_posix()) for path in files)


def link(source: str | Path, target: str | Path) -> None:
    """One file under two names, without a second copy of its bytes where the file system can."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        shutil.copyfile(source, target)  # the store is on another file system, or links are not allowed there


def _host() -> str:
    return socket.gethostname().replace(".", "-") or "host"


def _fsync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            _fsync(Path(directory) / name)
        _fsync(Path(directory))


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
