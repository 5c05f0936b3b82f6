"""Merges caches of one identity, captured on several machines.

Shards are linked as they are. Rows that an earlier cache has too must have the same bytes there, and are left
out of the later one: the rest of such a shard is written as a new one, with the same bytes that a capture of
these rows writes. All shards are also in the store, where the next capture of this identity finds them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import hidden, manifest, records
from storage.checksums import check_files, file_entries
from storage.disk import link_all
from storage.entries import ends, ranges
from storage.errors import ConfigError, Mismatch, SpecMismatch
from storage.fingerprints import sha256_json
from storage.manifest import Manifest, ShardEntry
from storage.reader import Cache
from storage.seal import CarriedWeights, SealedParts, seal
from storage.spec import Identity, shard_key
from storage.writer import Store, StoredShard

MOST_SHOWN = 10  # differing fields of an error

Indices = npt.NDArray[np.int64]


class Merged(NamedTuple):
    """The result of a merge."""

    manifest: Manifest
    dropped_rows: int  # in an earlier cache too


class _Part(NamedTuple):
    """Some rows of a shard, not decoded."""

    table: pa.Table
    arrays: Mapping[str, npt.NDArray[Any]]  # hidden states, row after row

    def take(self, rows: Indices, per_position: bool) -> "_Part":
        """These rows, in this order."""
        at = rows
        if per_position:
            lengths = self.table.column("num_tokens").to_numpy().astype(np.int64)
            at = ranges(ends(lengths)[rows], lengths[rows])
        return _Part(self.table.take(rows), {name: values[at] for name, values in self.arrays.items()})


def merge(caches: Sequence[Cache], out: Path, store: Store) -> Merged:
    """Seal the rows of all `caches`, in this order, into `out`.

    Raises SpecMismatch with every field that differs where they have different identities, or where a row of
    several of them is not the same in all; and what Cache.read raises for damage.
    """
    for cache in caches:
        if not isinstance(cache.path, Path):
            raise ConfigError(
                f"{cache.path} is not a directory: copy it here first (`dvc pull`), then merge it."
            )
    first = caches[0]
    if out.exists():
        raise ConfigError(f"{out} exists already: give the merged cache another name, or remove it.")
    for cache in caches[1:]:
        _check_identity(cache, first)
    store.lock_shared()
    _keep_tables(store, first)
    held: dict[str, tuple[Cache, ShardEntry, int]] = {}
    taken, dropped = [], 0
    for cache in caches:
        for shard in cache.shards:
            check_files(_root(cache), shard.files)
            row_ids = records.read_columns(_root(cache) / shard.logits_path, "row_id")[0].to_pylist()
            known = np.array([row in held for row in row_ids])
            if known.any():
                _check_rows(cache, shard, np.flatnonzero(known), [held.get(row) for row in row_ids])
                dropped += int(known.sum())
            if not known.all():
                taken.append(_take(store, cache, shard, np.flatnonzero(~known)))
            for index, row in enumerate(row_ids):
                held.setdefault(row, (cache, shard, index))
    weighed = next((cache for cache in caches if cache.manifest.weights is not None), None)
    merged = SealedParts(
        identity=first.identity,
        shards=taken,
        tokenizer_files=_tokenizer(first),
        provenance=first.manifest.provenance | {"merged": [cache.manifest_sha256 for cache in caches]},
        ranks=first.manifest.ranks,
        weights=None if weighed is None else _weights(weighed),
        basis=None if first.manifest.hidden_basis is None else _root(first) / manifest.BASIS_DIR,
    )
    return Merged(seal(out, merged), dropped)


def unpinned(identity: Identity) -> Identity:
    """The identity under which a store has the tables that the first capture fits for all later ones."""
    spec = identity.spec
    if spec.sparse is not None:
        spec = spec.model_copy(update={"codec": spec.sparse.model_copy(update={"ranks": None})})
    if spec.hidden is not None:
        spec = spec.model_copy(update={"hidden": spec.hidden.model_copy(update={"basis": None})})
    return identity.model_copy(update={"spec": spec})


def _check_identity(cache: Cache, first: Cache) -> None:
    advice = "Only caches of one teacher, tokenizer and spec can be merged; capture one of them again."
    cache.check(f"next to {first.path}", identity=first.identity, advice=advice)
    faults = []
    for name in ("tokenizer_files", "weights"):
        one, other = getattr(cache.manifest, name), getattr(first.manifest, name)
        if one != other and (name != "weights" or (one and other)):
            faults.append(Mismatch(name, _digest(one), _digest(other)))
    if faults:
        raise SpecMismatch(f"{cache.path} does not fit next to {first.path}", faults, advice)


def _root(cache: Cache) -> Path:
    assert isinstance(cache.path, Path)  # merge refuses caches at a URL
    return cache.path


def _digest(value: Any) -> str:
    return sha256_json([v.model_dump(mode="json") for v in (value if isinstance(value, tuple) else [value])])


def _keep_tables(store: Store, cache: Cache) -> None:
    """Store the cache's tables, so that the next capture of this identity reuses these shards."""
    named, spec = unpinned(cache.identity), cache.identity.spec
    if cache.manifest.ranks is not None and store.ranks(named) is None:
        store.keep_ranks(named, np.array(cache.manifest.ranks, np.int64))
    if cache.manifest.hidden_basis is not None and spec.hidden is not None:
        store.keep_basis(named, {name: cache.hidden_basis(name) for name in spec.hidden.component_names})


def _part(cache: Cache, shard: ShardEntry) -> _Part:
    cache.read(shard)  # checks it
    spec, arrays = cache.identity.spec, {}
    if spec.hidden is not None:
        num = shard.positions if cache.hidden_per_position else shard.rows
        arrays = hidden.read_arrays(_root(cache) / shard.hidden_path, num, spec.hidden)
    return _Part(records.read_table(_root(cache) / shard.logits_path, spec), arrays)


def _check_rows(
    cache: Cache, shard: ShardEntry, rows: Indices, places: Sequence[tuple[Cache, ShardEntry, int] | None]
) -> None:
    """Raise SpecMismatch where one of these rows has other targets in an earlier cache."""
    own, faults = _part(cache, shard), []
    earlier: dict[str, list[int]] = {}
    for row in rows:
        place = places[row]
        assert place is not None
        earlier.setdefault(f"{place[0].path}/{place[1].key}", []).append(int(row))
    for group in earlier.values():
        found = [place for row in group if (place := places[row])]
        one = own.take(np.array(group), cache.hidden_per_position)
        before = _part(*found[0][:2])
        other = before.take(np.array([index for _, _, index in found]), cache.hidden_per_position)
        if not _equal(one, other):
            faults += _differences(one, other, cache.hidden_per_position)
    if faults:
        raise SpecMismatch(
            f"{cache.path} has other targets than an earlier cache for the same rows",
            faults[:MOST_SHOWN],
            "Machines that round differently compute other numbers: leave these rows out of one dataset.",
        )


def _equal(one: _Part, other: _Part) -> bool:
    same = all(values.tobytes() == other.arrays[name].tobytes() for name, values in one.arrays.items())
    return same and one.table.equals(other.table)


def _differences(one: _Part, other: _Part, per_position: bool) -> list[Mismatch]:
    """The differing fields of the first differing rows."""
    faults: list[Mismatch] = []
    for index in range(len(one.table)):
        mine, theirs = (part.take(np.array([index]), per_position) for part in (one, other))
        row = mine.table.column("row_id")[0].as_py()
        for name in mine.table.column_names:
            found, expected = mine.table.column(name)[0].as_py(), theirs.table.column(name)[0].as_py()
            if found != expected:
                faults.append(Mismatch(f"row {row}: {name}", found, expected))
        for name, values in mine.arrays.items():
            if values.tobytes() != theirs.arrays[name].tobytes():
                found, expected = values.ravel().tolist(), theirs.arrays[name].ravel().tolist()
                faults.append(Mismatch(f"row {row}: {name}", found, expected))
        if len(faults) >= MOST_SHOWN:
            break
    return faults


def _take(store: Store, cache: Cache, shard: ShardEntry, rows: Indices) -> StoredShard:
    """These rows of a shard as a shard of the store."""
    identity = cache.identity
    if len(rows) == shard.rows:

        def whole(aside: Path) -> ShardEntry:
            link_all(_root(cache), aside, [file.path for file in shard.files])
            return shard

        return store.add(identity, shard.key, 0.0, whole)
    part = _part(cache, shard).take(rows, cache.hidden_per_position)
    row_ids, inputs = (part.table.column(name).to_pylist() for name in ("row_id", "input_hash"))
    key = shard_key(identity, row_ids, inputs)

    def write(aside: Path) -> ShardEntry:
        (aside / "logits").mkdir()
        records.write_table(aside / "logits" / f"{key}.parquet", part.table, identity.spec)
        if identity.spec.hidden is not None:
            hidden.write_arrays(aside / "hidden" / key, part.arrays, identity.spec.hidden)
        return ShardEntry(
            key=key,
            rows=len(row_ids),
            positions=int(part.table.column("num_tokens").to_numpy().sum()),
            inputs=sha256_json(inputs),
            files=file_entries(aside),
        )

    return store.add(identity, key, 0.0, write)


def _tokenizer(cache: Cache) -> dict[str, bytes]:
    directory = cache.tokenizer_dir
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*"))}


def _weights(cache: Cache) -> CarriedWeights:
    return CarriedWeights(
        cache.weights_layers,
        partial(link_all, cache.weights_dir, names=("config.json", "model.safetensors")),
    )
