"""A store whose finished shards several machines share through a URL.

Shards are written to a local store (storage/writer.py) and uploaded when they are finished; those of other
machines are fetched, whole and checked. Nothing is listed: a shard is found by its key, which follows from
its rows.

    <url>/<identity fingerprint>/<key>/shard.json       its entry; written last, by one machine
    <url>/<identity fingerprint>/<key>/<offer>/...      its files; <offer> is a digest of the entry
    <url>/bases/<identity fingerprint>/basis.json       the list of files of bases
    <url>/bases/<identity fingerprint>/<offer>/...
    <url>/ranks/<identity fingerprint>.json             frequent ids

Two machines that finish the same shard may differ in the last bits of a number. The first shard.json stays
(S3's If-None-Match), the other machine fetches the files of the first one, and both seal the same bytes.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from storage import hidden, records
from storage.checksums import file_entries
from storage.compact import MAX_RANKED, Columns
from storage.disk import disk_full_explained
from storage.errors import CacheError
from storage.fingerprints import canonical_json, sha256_json
from storage.location import Url, location
from storage.manifest import FileEntry, ShardEntry
from storage.remote import Objects
from storage.spec import Identity
from storage.writer import Store, StoredShard

MAX_RECORD_BYTES = 2**24  # of a shard.json or a basis.json
MAX_RANKS_BYTES = 16 * MAX_RANKED
AT_ONCE = 16  # shards that are fetched at a time
SHARED = "shared"  # a file in a shard's local directory: the URL that has the shard

Files = TypeAdapter(list[FileEntry])


def open_store(root: Path, where: str | None) -> Store:
    """The store at `where`, a path or a URL; None: the one at `root`. One at a URL works in `root`, too."""
    if where is None:
        return Store(root)
    there = location(where)
    return SharedStore(root, there) if isinstance(there, Url) else Store(there)


class SharedStore(Store):
    """The finished shards below `root`, shared at `url`."""

    def __init__(self, root: Path, url: Url) -> None:
        super().__init__(root)
        self.objects = Objects(url)

    def fetch(self, identity: Identity, keys: Iterable[str]) -> None:
        """Fetch those of these shards that only the URL has, and upload finished ones that only this machine
        has.

        A shard that is damaged at the URL counts as unfinished. Raises StoreUnreachable.
        """
        if not all(
            self._is_shared(meta.parent) for meta in (self.root / identity.fingerprint).glob("*/shard.json")
        ):
            for shard in self.finished(identity):
                if not self._is_shared(shard.root):
                    self._share_shard(identity, shard)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda key: self._fetch_missing(identity, key), keys))

    def put(
        self,
        identity: Identity,
        rows: records.LogitRows | records.EntryRows,
        states: Mapping[str, npt.NDArray[np.float32]],
        seconds: float,
        packed: Columns | None = None,
    ) -> StoredShard:
        """Write one finished shard and upload it; return the shared one, perhaps another machine's.

        Raises StoreFull, and StoreUnreachable: then the next capture uploads the shard.
        """
        return self._share_shard(identity, super().put(identity, rows, states, seconds, packed))

    def ranks(self, identity: Identity) -> npt.NDArray[np.int64] | None:
        """The table of frequent ids that captures of this identity share, on any machine."""
        try:
            raw = self.objects.read(f"ranks/{identity.fingerprint}.json", MAX_RANKS_BYTES)
        except FileNotFoundError:
            return None
        return super().keep_ranks(identity, np.array(json.loads(raw), np.int64))

    def keep_ranks(self, identity: Identity, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Store the table of frequent ids; return the shared one, perhaps another machine's."""
        self.objects.write(f"ranks/{identity.fingerprint}.json", canonical_json(ranks.tolist()), once=True)
        shared = self.ranks(identity)
        assert shared is not None
        return shared

    def basis(self, identity: Identity) -> Path | None:
        """The directory of the bases that captures of this identity share, on any machine."""
        name = f"bases/{identity.fingerprint}"
        record = self._record(f"{name}/basis.json")
        if record is None:
            return None
        files = tuple(Files.validate_python(record))
        path = self.root / name
        shutil.rmtree(path, ignore_errors=True)
        with self._aside() as aside, disk_full_explained(self.root):
            self._download(f"{name}/{_offer(record)}", files, aside / "basis")
            path.parent.mkdir(parents=True, exist_ok=True)
            (aside / "basis").rename(path)
        return path

    def keep_basis(self, identity: Identity, bases: Mapping[str, hidden.Basis]) -> Path:
        """Store these bases; return the directory of the shared ones, perhaps another machine's."""
        path, name = super().keep_basis(identity, bases), f"bases/{identity.fingerprint}"
        self._upload(name, "basis.json", path, [file.model_dump(mode="json") for file in file_entries(path)])
        shared = self.basis(identity)
        assert shared is not None
        return shared

    def _share_shard(self, identity: Identity, shard: StoredShard) -> StoredShard:
        """Upload a finished shard; return the shared one."""
        key, name = shard.entry.key, f"{identity.fingerprint}/{shard.entry.key}"
        body = json.loads((shard.root / "shard.json").read_bytes())
        if not self._upload(name, "shard.json", shard.root, body):
            theirs = self._fetch_shard(identity, key)
            if theirs is None:  # the shared one is damaged: replace it
                self._upload(name, "shard.json", shard.root, body, replace=True)
            else:
                return theirs
        (shard.root / SHARED).write_text(str(self.objects.url))
        return shard

    def _is_shared(self, shard: Path) -> bool:
        mark = shard / SHARED
        return mark.is_file() and mark.read_text() == str(self.objects.url)

    def _fetch_missing(self, identity: Identity, key: str) -> None:
        if not (self.root / identity.fingerprint / key).is_dir():
            self._fetch_shard(identity, key)

    def _fetch_shard(self, identity: Identity, key: str) -> StoredShard | None:
        """The shared shard of this key, in place of a local one; None where it is missing or damaged."""
        name, final = f"{identity.fingerprint}/{key}", self.root / identity.fingerprint / key
        try:
            body = self._record(f"{name}/shard.json")
            if body is None:
                return None
            entry, seconds = ShardEntry.model_validate(body["entry"]), float(body["seconds"])
            if entry.key != key or not all(_own(entry, file) for file in entry.files):
                return None
            with self._aside() as aside, disk_full_explained(self.root):
                self._download(f"{name}/{_offer(body)}", entry.files, aside)
                (aside / "shard.json").write_bytes(canonical_json(body))
                (aside / SHARED).write_text(str(self.objects.url))
                shutil.rmtree(final, ignore_errors=True)  # it may differ from the shared one in last bits
                final.parent.mkdir(parents=True, exist_ok=True)
                aside.rename(final)
        except (CacheError, ValidationError, ValueError, KeyError, TypeError):
            return None
        return StoredShard(final, entry, seconds)

    def _record(self, path: str) -> Any:
        try:
            return json.loads(self.objects.read(path, MAX_RECORD_BYTES))
        except FileNotFoundError:
            return None

    def _upload(self, name: str, record: str, root: Path, body: Any, replace: bool = False) -> bool:
        """Upload files, then their record; return whether this record is the shared one."""
        files = body["entry"]["files"] if isinstance(body, dict) else body
        for file in files:
            self.objects.write(f"{name}/{_offer(body)}/{file['path']}", root / file["path"])
        return self.objects.write(f"{name}/{record}", canonical_json(body), once=not replace)

    def _download(self, name: str, files: Iterable[FileEntry], root: Path) -> None:
        below = Objects(self.objects.url / name)
        for file in files:
            below.fetch(file, root)


def _own(entry: ShardEntry, file: FileEntry) -> bool:
    return file.path == entry.logits_path or file.path.startswith(f"{entry.hidden_path}/")


def _offer(body: Any) -> str:
    """The name of the directory of a record's files: another content has another name."""
    return sha256_json(body)[:16]
