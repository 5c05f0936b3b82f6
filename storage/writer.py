"""Finished shards, and how they become a cache.

A store is a directory of finished shards, each in a directory named by what it is made of:

    <store>/<identity fingerprint>/<shard key>/shard.json          its manifest entry, and what it cost
                                              /logits/<key>.parquet
                                              /hidden/<key>/...
    <store>/ranks/<identity fingerprint>.json      frequent ids, for compact layouts
    <store>/bases/<identity fingerprint>/...       mean and axes, for hidden states as principal components
    <store>/in-use                                 who holds it, takes shards from here now
    <store>/tmp/                                   what is being written, swept when its writer is gone

A shard is written aside, flushed to disk and renamed, so it is there whole or not at all, whoever else writes
it too.
`seal` links finished shards into a cache and writes the manifest last, in a directory that is renamed into
place.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import hidden, manifest, records
from storage.compact import Columns
from storage.disk import DISK_FULL
from storage.disk import disk_full_explained as _disk_full_explained
from storage.errors import CacheError, ManifestInvalid
from storage.manifest import FileEntry, Manifest, ShardEntry, WeightsEntry
from storage.shard_table import ShardTable
from storage.spec import Identity, canonical_json, content_fingerprint, sha256_json, shard_key
from storage.verify import check_files, file_entry

STALE_SECONDS = 24 * 3600
REPLACED = "-replaced"  # ends the name of a cache that has made way for a new one
RANKS_FORMAT = "stillroom-ranks"
LOCK = "in-use"  # a file of the store: captures hold it together, a clean-up alone


class StoredShard(NamedTuple):
    """A finished shard in a store."""

    root: Path  # the directory that its entry's paths are relative to
    entry: ShardEntry
    seconds: float  # what the teacher needed for it

    def row_ids(self) -> pa.StringArray:
        """The ids of its rows, in order."""
        return records.read_columns(self.root / self.entry.logits_path, "row_id")[0]


class Weights(NamedTuple):
    """Weights of the teacher for a cache to carry."""

    layers: tuple[int, ...]
    write: Callable[[Path], None]  # puts config.json and model.safetensors into a directory


class Store:
    """The finished shards below `root`. Any number of processes may use one store at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tmp = root / "tmp"

    def hold(self) -> None:
        """Say that this process takes shards from here, for as long as this object lives: none may go.

        Any number of processes hold a store at once, and one that is killed lets go. Waits for a clean-up.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.root / LOCK, os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_SH)

    def finished(self, identity: Identity) -> list[StoredShard]:
        """Every sound shard made under `identity`, largest first. Damaged ones are removed."""
        found = []
        for meta in sorted((self.root / identity.fingerprint).glob("*/shard.json")):
            try:
                shard = _stored(meta.parent)
            except (CacheError, ValueError, KeyError, TypeError):
                shutil.rmtree(
                    meta.parent
                )  # shards are renamed into place whole: this one is damaged, not unfinished
            else:
                found.append(shard)
        return sorted(found, key=lambda shard: (-shard.entry.rows, shard.entry.key))

    def shard(self, identity: Identity, key: str) -> StoredShard | None:
        """The finished shard of this name, or None. Raises CacheError where it is damaged."""
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
        """Write one finished shard; `packed` are its entries in the compact layout, where that is asked for.

        Raises StoreFull where the disk ends; earlier shards stay.
        """
        row_ids, inputs = rows.row_ids.to_pylist(), rows.input_hashes.to_pylist()
        key = shard_key(identity, row_ids, inputs)

        def write(aside: Path) -> ShardEntry:
            (aside / "logits").mkdir()
            path, spec = aside / "logits" / f"{key}.parquet", identity.spec
            if isinstance(rows, records.LogitRows):
                records.write(path, rows, spec.labels, spec.column)
            elif spec.codec != "dense":
                records.write_sparse(path, rows, spec.codec, spec.labels, packed)
            if identity.spec.hidden is not None:
                hidden.write(aside / "hidden" / key, states, identity.spec.hidden)
            return ShardEntry(
                key=key,
                rows=len(row_ids),
                positions=int(rows.num_tokens.sum()),
                inputs=sha256_json(inputs),
                files=file_entries(aside),
            )

        return self.take_in(identity, key, seconds, write)

    def take_in(
        self, identity: Identity, key: str, seconds: float, write: Callable[[Path], ShardEntry]
    ) -> StoredShard:
        """The finished shard of this name; where it is not there, `write` puts its files into a directory.

        Raises StoreFull.
        """
        final = self.root / identity.fingerprint / key
        with self._aside() as aside, _disk_full_explained(self.root):
            entry = write(aside)
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
                entry = ShardEntry.model_validate(json.loads((final / "shard.json").read_bytes())["entry"])
            _fsync(final.parent)
        return StoredShard(final, entry, seconds)

    def bring(self, identity: Identity, keys: Iterable[str]) -> None:
        """Have shards here that were finished elsewhere: nothing to do for a store in one place."""

    def ranks(self, identity: Identity) -> npt.NDArray[np.int64] | None:
        """The table of frequent ids that captures of this identity share, where one was kept.

        Raises ManifestInvalid where it is damaged: with another table no shard would be found again.
        """
        path = self._ranks_path(identity)
        if not path.is_file():
            return None
        raw, again = path.read_bytes(), "Remove it: the same table is made again from the same first rows."
        if raw.startswith(b"["):  # of before there were checksums
            try:
                return np.array(json.loads(raw), np.int64)
            except ValueError as error:
                raise ManifestInvalid(f"{path} is no table of ids: {error}.\n{again}") from None
        return np.array(manifest.open_sealed(raw, path, RANKS_FORMAT, again)["ranks"], np.int64)

    def keep_ranks(self, identity: Identity, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Keep the table of frequent ids; return the one that is there now, perhaps another worker's."""
        path = self._ranks_path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._aside() as aside, _disk_full_explained(self.root):
            body = {"format": RANKS_FORMAT, "ranks": ranks.tolist()}
            (aside / path.name).write_bytes(manifest.seal(body))
            _fsync(aside / path.name)
            os.replace(aside / path.name, path)
        kept = Store.ranks(self, identity)  # the one here, also of a store that shares its own elsewhere
        assert kept is not None
        return kept

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
            host, pid, *_ = [*aside.name.split("."), ""]
            _sweep(aside, host, pid)

    def aside_name(self) -> Path:
        """A path below tmp/ that is this process's own."""
        return self._tmp / f"{_host()}.{os.getpid()}.{uuid.uuid4().hex}"

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Path]:
        aside = self.aside_name()
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
    shutil.rmtree(aside, ignore_errors=True)
    for other in cache.parent.glob(f".{cache.name}.*.*"):
        _sweep(other, *other.name.split(".")[-2:])
    with _disk_full_explained(cache.parent):
        (aside / "tokenizer").mkdir(parents=True)
        for name, content in tokenizer_files.items():
            (aside / "tokenizer" / name).write_bytes(content)
        tokenizer = file_entries(aside)
        carried = None
        if weights is not None:
            (aside / "weights").mkdir()
            weights.write(aside / "weights")
            carried = WeightsEntry(layers=weights.layers, files=file_entries(aside, "weights"))
        based = None
        if basis is not None:
            for source in sorted(path for path in basis.rglob("*") if path.is_file()):
                target = aside / manifest.BASIS_DIR / source.relative_to(basis)
                target.parent.mkdir(parents=True, exist_ok=True)
                link(source, target)
            based = file_entries(aside, manifest.BASIS_DIR)
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
        _put_in_place(aside, cache)
        _fsync(cache.parent)
    return sealed


def _put_in_place(aside: Path, cache: Path) -> None:
    """Rename a finished directory over another one, whoever else does so now: the last one stays."""
    old = aside.with_name(f"{aside.name}{REPLACED}")
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.rename(cache, old)
        shutil.rmtree(old, ignore_errors=True)  # another capture may be sweeping it
        try:
            os.rename(aside, cache)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def _stored(root: Path) -> StoredShard:
    """A shard of a store, its files checked."""
    body = json.loads((root / "shard.json").read_bytes())
    shard = StoredShard(root, ShardEntry.model_validate(body["entry"]), float(body["seconds"]))
    check_files(shard.root, shard.entry.files)
    return shard


def _sweep(aside: Path, host: str, pid: str) -> None:
    """Remove what a writer of this host, a process that is gone, left behind; or anybody, a day ago.

    Another sweep may be removing it too.
    """
    with contextlib.suppress(FileNotFoundError):
        found = aside.lstat()
        stale = found.st_mtime < time.time() - STALE_SECONDS
        if stale or (host == _host() and not _lives(pid.removesuffix(REPLACED))):
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink()


def _lives(pid: str) -> bool:
    """Whether such a process of this host runs. One that has ended but is not waited for runs no more."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError, ValueError):
        return True  # another user's, or no number: left to whoever comes after a day
    with contextlib.suppress(OSError):  # there is no /proc outside Linux
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def file_entries(root: Path, below: str = "") -> tuple[FileEntry, ...]:
    """The entries of all files below `root / below`, relative to `root`."""
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
