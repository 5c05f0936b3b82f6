"""Seals a cache: links finished shards into a directory, writes the manifest last, renames the directory."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from storage import manifest
from storage.checksums import file_entries, file_entry
from storage.disk import disk_full_explained, link_all, replaced_directory
from storage.fingerprints import content_fingerprint
from storage.manifest import FileEntry, Manifest, WeightsEntry
from storage.shard_table import ShardTable
from storage.spec import Identity
from storage.writer import StoredShard


class CarriedWeights(NamedTuple):
    """The teacher's weights for a cache to carry."""

    layers: tuple[int, ...]
    write: Callable[[Path], None]  # writes config.json and model.safetensors into a directory


class SealedParts(NamedTuple):
    """All that a cache is made of. The result of `seal` depends on these alone: no time, path or worker."""

    identity: Identity
    shards: Sequence[StoredShard]  # in the cache's order
    tokenizer_files: Mapping[str, bytes]  # name -> content, for students with the teacher's tokenizer
    provenance: Mapping[str, Any]
    ranks: Sequence[int] | None = None  # the table of frequent ids of a compact layout
    weights: CarriedWeights | None = None
    basis: Path | None = None  # `Store.basis`, for hidden states as principal components


def seal(cache: Path, parts: SealedParts) -> Manifest:
    """Link finished shards into `cache` and write its manifest. Replaces what was there. Raises StoreFull."""
    with disk_full_explained(cache.parent), replaced_directory(cache) as aside:
        return _write(aside, parts)


def _write(aside: Path, parts: SealedParts) -> Manifest:
    """Write the whole cache into the directory `aside`, the manifest last."""
    tokenizer = _write_tokenizer(aside, parts.tokenizer_files)
    weights = None if parts.weights is None else _write_weights(aside, parts.weights)
    basis = None if parts.basis is None else _link_basis(aside, parts.basis)
    row_ids = _link_shards(aside, parts.shards)
    entries, table = tuple(shard.entry for shard in parts.shards), None
    if len(entries) > manifest.MOST_LISTED:
        ShardTable.of(parts.identity.spec, entries).write(aside / manifest.TABLE_NAME)
        table = file_entry(aside, manifest.TABLE_NAME)
    sealed = Manifest(
        format_version=manifest.needed_version(parts.identity, weights, table),
        identity=parts.identity,
        dataset=content_fingerprint(row_ids),
        shards=() if table else entries,
        shard_table=table,
        tokenizer_files=tokenizer,
        provenance=dict(parts.provenance),
        ranks=None if parts.ranks is None else tuple(int(rank) for rank in parts.ranks),
        weights=weights,
        hidden_basis=basis,
    )
    if table is not None:
        sealed = sealed.with_table(entries)
    (aside / manifest.MANIFEST_NAME).write_bytes(manifest.render(sealed))
    return sealed


def _write_tokenizer(aside: Path, files: Mapping[str, bytes]) -> tuple[FileEntry, ...]:
    directory = aside / manifest.TOKENIZER_DIR
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return file_entries(aside, manifest.TOKENIZER_DIR)


def _write_weights(aside: Path, weights: CarriedWeights) -> WeightsEntry:
    (aside / manifest.WEIGHTS_DIR).mkdir()
    weights.write(aside / manifest.WEIGHTS_DIR)
    return WeightsEntry(layers=weights.layers, files=file_entries(aside, manifest.WEIGHTS_DIR))


def _link_basis(aside: Path, basis: Path) -> tuple[FileEntry, ...]:
    files = [path.relative_to(basis).as_posix() for path in sorted(basis.rglob("*")) if path.is_file()]
    link_all(basis, aside / manifest.BASIS_DIR, files)
    return file_entries(aside, manifest.BASIS_DIR)


def _link_shards(aside: Path, shards: Sequence[StoredShard]) -> list[str]:
    """Link the shards' files; the ids of all rows, in order."""
    row_ids: list[str] = []
    for shard in shards:
        row_ids.extend(shard.row_ids().to_pylist())
        link_all(shard.root, aside, [file.path for file in shard.entry.files])
    return row_ids
