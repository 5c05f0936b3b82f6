"""Finished shards become a cache: linked into a directory, the manifest written last, renamed into place."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from storage import manifest
from storage.checksums import file_entries, file_entry
from storage.disk import REPLACED, fsync, fsync_tree, host_name, link, sweep_stale
from storage.disk import disk_full_explained as _disk_full_explained
from storage.fingerprints import content_fingerprint
from storage.manifest import Manifest, WeightsEntry
from storage.shard_table import ShardTable
from storage.spec import Identity
from storage.writer import StoredShard


class CarriedWeights(NamedTuple):
    """Weights of the teacher for a cache to carry."""

    layers: tuple[int, ...]
    write: Callable[[Path], None]  # puts config.json and model.safetensors into a directory


def seal(
    cache: Path,
    identity: Identity,
    shards: Sequence[StoredShard],
    tokenizer_files: Mapping[str, bytes],
    provenance: Mapping[str, Any],
    ranks: Sequence[int] | None = None,
    weights: CarriedWeights | None = None,
    basis: Path | None = None,
) -> Manifest:
    """Link finished shards into `cache`, in this order, and write its manifest. Replaces what was there.

    `tokenizer_files` maps a file name to its content: a student that reads with the teacher's tokenizer finds
    it in the cache; one that starts from the teacher's weights finds them there too. `basis` is the directory
    of `Store.basis`, where hidden states are principal components. The result depends on the arguments alone:
    no time, no path, no worker.
    """
    aside = cache.parent / f".{cache.name}.{host_name()}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    for other in cache.parent.glob(f".{cache.name}.*.*"):
        sweep_stale(other, *other.name.split(".")[-2:])
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
        fsync_tree(aside)
        _put_in_place(aside, cache)
        fsync(cache.parent)
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
