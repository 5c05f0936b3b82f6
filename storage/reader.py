"""`Cache`: reads a sealed cache. Everything that reads one does so through it."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage import hidden, manifest, records
from storage.checksums import AGAIN, check_no_stray, check_sizes
from storage.codecs import Codec
from storage.compact import Ranks
from storage.errors import Mismatch, NoManifest, ShardCorrupt, SpecMismatch
from storage.files import Files, LocalFiles, RemoteFiles
from storage.fingerprints import content_fingerprint, sha256_json
from storage.hidden import Basis
from storage.local_copies import LocalCopies
from storage.location import Location, location
from storage.manifest import FileEntry, Manifest, ShardEntry
from storage.shard_table import ShardTable
from storage.spec import Identity

if TYPE_CHECKING:
    from storage.remote import Objects

LOCAL_COPIES = Path(".stillroom/nearby")


class Cache:
    """A sealed cache. Every file's digest is compared before the file is used."""

    def __init__(self, path: Location, sealed: Manifest, files: Files) -> None:
        self.path = path
        self.manifest = sealed
        self.files = files
        self._kept: dict[str, Path] = {}  # directories that stay while this object lives
        self._holding = ExitStack()

    @classmethod
    def open(
        cls, path: str | Location, local: str | Path = LOCAL_COPIES, limit_bytes: int | None = None
    ) -> Self:
        """The cache at `path`. Checks its manifest, and that each listed file is there with its size (files
        of shards in a table are checked when they are read).

        `path` may be a URL (s3://bucket/caches/reviews). Then only the manifest is read now; files are copied
        below the directory `local` when they are first read, at most `limit_bytes` at a time (None: all).
        Raises NoManifest, ManifestInvalid, FormatTooNew, ShardMissing or ShardTruncated; for a URL also
        StoreUnreachable, and ConfigError where the limit has no room for a shard.
        """
        path = location(path)
        if isinstance(path, Path):
            sealed, local_files = manifest.load(path), LocalFiles(path)
            check_sizes(path, sealed.own_files if sealed.shard_table else sealed.files)
            return cls(path, _with_table(path, sealed, local_files), local_files)
        from storage.remote import Objects  # fsspec takes a tenth of a second to import

        objects, copies = Objects(path), LocalCopies(Path(local), limit_bytes)
        remote_files = RemoteFiles(objects, copies)
        sealed = _with_table(path, _load_remote(objects), remote_files)
        copies.check_limit(path, _at_once(sealed))
        return cls(path, sealed, remote_files)

    @property
    def identity(self) -> Identity:
        """Teacher, tokenizer, and what is stored of the teacher's outputs."""
        return self.manifest.identity

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits; empty for a language model, and for vectors."""
        return self.identity.spec.labels

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        shards = self.manifest.every_shard
        return shards.num_rows if isinstance(shards, ShardTable) else self.manifest.num_rows

    @property
    def shards(self) -> Sequence[ShardEntry]:
        """The shards, in order."""
        return self.manifest.every_shard

    @property
    def hidden_names(self) -> tuple[str, ...]:
        """The stored vectors of the teacher: `layer.<n>` for states (0 = embeddings), `qkv.<n>` for queries,
        keys and values (1 = the first block); empty for none.
        """
        return self.identity.spec.hidden.names if self.identity.spec.hidden else ()

    @property
    def hidden_per_position(self) -> bool:
        """Whether there is a vector for each token, and not one a row."""
        return self.identity.spec.hidden is not None and self.identity.spec.hidden.pool == "none"

    @property
    def tokenizer_dir(self) -> Path:
        """The directory of the teacher's tokenizer files, checked; it has no other files."""
        return self._keep(self.manifest.tokenizer_files, manifest.TOKENIZER_DIR)

    @property
    def weights_layers(self) -> tuple[int, ...]:
        """The teacher's layers whose weights the cache carries (0 = the first); empty for none."""
        return self.manifest.weights.layers if self.manifest.weights else ()

    @property
    def weights_dir(self) -> Path:
        """The directory of the teacher's weights, checked; it has no other files. Raises SpecMismatch where
        the cache has none.
        """
        if self.manifest.weights is None:
            raise SpecMismatch(
                f"{self.path} carries no weights of its teacher",
                [Mismatch("weights", "none", "some layers")],
                f"Write weights: {{layers: [...]}} under caches.{self.path.name} in params.yaml and run "
                f"`dvc repro cache@{self.path.name}`: finished shards are reused.",
            )
        return self._keep(self.manifest.weights.files, manifest.WEIGHTS_DIR)

    @property
    def manifest_sha256(self) -> str:
        """sha256 hex of manifest.json, which determines every byte of the cache."""
        return sha256_json(manifest.fields(self.manifest))

    @property
    def codec(self) -> Codec:
        """How the teacher's outputs are stored."""
        return self.identity.spec.codec

    @property
    def ranks(self) -> Ranks:
        """The order in which compact shards number ids; the order of ids for other caches."""
        frequent = np.array(self.manifest.ranks or (), np.int64)
        return Ranks(frequent, self.identity.spec.num_outputs)

    def read(self, shard: ShardEntry) -> records.LogitRows | records.EntryRows:
        """The rows of one shard: logits for the dense codec (of each row, or of each token), entries for a
        sparse one, whatever its layout. Raises ShardMissing, ShardTruncated or ShardCorrupt.
        """
        path, spec = self.path / shard.logits_path, self.identity.spec
        rows: records.LogitRows | records.EntryRows
        with self.files.holding(_logits(shard)) as root:
            file = root / shard.logits_path
            if spec.sparse is None:
                rows = records.read(file, spec.num_outputs, spec.per_position, spec.column)
            else:
                rows = records.read_sparse(file, spec.sparse, self.ranks, spec.per_position)
        found = (len(rows.row_ids), int(rows.num_tokens.sum()), sha256_json(rows.input_hashes.to_pylist()))
        if found != (shard.rows, shard.positions, shard.inputs):
            raise ShardCorrupt(
                f"{path} is not the shard in the manifest.\n"
                f"  rows, positions, inputs found    {found}\n"
                f"  rows, positions, inputs expected {(shard.rows, shard.positions, shard.inputs)}\n{AGAIN}"
            )
        if (empty := np.flatnonzero(rows.num_tokens < 1)).size:
            raise ShardCorrupt(f"{path}: row {rows.row_ids[int(empty[0])]} has no tokens.\n{AGAIN}")
        if isinstance(rows, records.LogitRows) and not np.isfinite(rows.logits).all():
            bad = int(rows.owners[~np.isfinite(rows.logits).all(axis=1)][0])
            raise ShardCorrupt(f"{self.path}: the logits of row {rows.row_ids[bad]} are not finite.\n{AGAIN}")
        return rows

    def hidden(self, shard: ShardEntry, name: str) -> npt.NDArray[np.float32]:
        """The vectors of one of `hidden_names`, for the rows of `read(shard)`: [rows, W], or [positions, W]
        row after row. W is the number of components with pca, and three widths for queries, keys and values.

        Raises ValueError for a name that is not stored, and what `read` raises for damage.
        """
        spec = self.identity.spec.hidden
        if spec is None or name not in spec.names:
            raise ValueError(f"{self.path} has the hidden states {list(self.hidden_names)}, not {name}")
        num = shard.positions if self.hidden_per_position else shard.rows
        with self.files.holding(_states(shard)) as root:
            return hidden.read(root / shard.hidden_path, name, num, spec)

    def hidden_basis(self, name: str) -> Basis:
        """(mean [W], axes [m, W]) of one of `hidden_names`: a state is about mean + components @ axes.

        Raises ValueError for a name that is not stored as components, and what `read` raises for damage.
        """
        spec = self.identity.spec.hidden
        if spec is None or self.manifest.hidden_basis is None or name not in spec.component_names:
            raise ValueError(f"{self.path} does not have {name} as principal components: there is no basis")
        with self.files.holding(self.manifest.hidden_basis) as root:
            bases = hidden.read_bases(root / manifest.BASIS_DIR, spec)
        if (found := hidden.fingerprint(bases)) != spec.basis:
            raise ShardCorrupt(
                f"{self.path / manifest.BASIS_DIR} is not the basis of these components.\n"
                f"  found    {found}\n  expected {spec.basis}\n{AGAIN}"
            )
        return bases[name]

    def input_hashes(self) -> pa.StringArray:
        """The hashes of each row's inputs, in cache order."""
        return pa.concat_arrays([self._columns(shard, "input_hash")[0] for shard in self.shards])

    def row_ids(self) -> pa.StringArray:
        """The ids of all rows, in cache order."""
        return self.index()[0]

    def index(self) -> tuple[pa.StringArray, npt.NDArray[np.int32]]:
        """(ids, numbers of tokens) of all rows, in cache order, without decoding a target."""
        return self._index

    @cached_property
    def _index(self) -> tuple[pa.StringArray, npt.NDArray[np.int32]]:
        parts = [self._columns(shard, "row_id", "num_tokens") for shard in self.shards]
        lengths = np.concatenate([lengths.to_numpy() for _, lengths in parts])
        return pa.concat_arrays([ids for ids, _ in parts]), lengths

    def _columns(self, shard: ShardEntry, *names: str) -> list[pa.Array]:
        with self.files.holding(_logits(shard)) as root:
            return records.read_columns(root / shard.logits_path, *names)

    def check(
        self,
        what: str,
        *,
        identity: Identity | None = None,
        labels: Iterable[str] | None = None,
        row_ids: pa.StringArray | None = None,
        whole: bool = False,
        advice: str = "Choose a cache of this data, or rebuild it.",
    ) -> None:
        """Raise SpecMismatch, with every field that differs, where the cache does not fit `what`.

        `identity`: the expected teacher, tokenizer and spec. `labels`: class names in order. `row_ids`: rows
        that must all have a target; with `whole`, the cache must have these rows and no others.
        """
        faults: list[Mismatch] = []
        if identity is not None:
            faults += _differences(self.identity.model_dump(), identity.model_dump())
        if labels is not None and list(labels) != list(self.labels):
            faults.append(Mismatch("dataset.labels", list(self.labels), list(labels)))
        if row_ids is not None:
            import pyarrow.compute as pc  # opening a cache does not need it

            wanted = pc.unique(row_ids)
            missing = wanted.filter(pc.invert(pc.is_in(wanted, value_set=self.row_ids())))
            if len(missing):
                some = ", ".join(missing.slice(0, 3).to_pylist())
                faults.append(Mismatch("rows with a target", len(wanted) - len(missing), len(wanted)))
                faults.append(
                    Mismatch("rows without one", some + (", ..." if len(missing) > 3 else ""), "none")
                )
            if whole and self.manifest.dataset != (content := content_fingerprint(wanted.to_pylist())):
                faults.append(Mismatch("dataset.content", self.manifest.dataset, content))
        if faults:
            raise SpecMismatch(f"{self.path} does not fit {what}", faults, advice)

    def _keep(self, files: Sequence[FileEntry], directory: str) -> Path:
        """A directory of the cache, with these files and no others, for as long as this object lives."""
        if directory not in self._kept:
            if isinstance(self.path, Path):  # copies of remote files are made one by one, by name
                check_no_stray(self.path, {file.path for file in files}, directory)
            self._kept[directory] = self._holding.enter_context(self.files.holding(files)) / directory
        return self._kept[directory]


def _logits(shard: ShardEntry) -> list[FileEntry]:
    return [file for file in shard.files if file.path == shard.logits_path]


def _states(shard: ShardEntry) -> list[FileEntry]:
    return [file for file in shard.files if file.path != shard.logits_path]


def _load_remote(objects: "Objects") -> Manifest:
    """The manifest of the cache at a URL."""
    try:
        raw = objects.read(manifest.MANIFEST_NAME, manifest.MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise NoManifest(
            f"there is no cache at {objects.url}: no {manifest.MANIFEST_NAME}, which is written last.\n"
            "Check the URL, and that the upload has ended."
        ) from None
    return manifest.parse(raw, objects.url / manifest.MANIFEST_NAME)


def _at_once(sealed: Manifest) -> int:
    """Bytes that a student needs at the same time: the files that it keeps open, and the largest piece."""
    kept = [*sealed.tokenizer_files, *(sealed.weights.files if sealed.weights else ())]
    shards = sealed.every_shard
    if isinstance(shards, ShardTable):
        largest = shards.largest_piece()
    else:
        largest = max(_size(own(shard)) for shard in shards for own in (_logits, _states))
    return _size(kept) + max(largest, _size(sealed.hidden_basis or ()))


def _size(files: Iterable[FileEntry]) -> int:
    return sum(file.bytes for file in files)


def _with_table(where: Location, sealed: Manifest, files: Files) -> Manifest:
    """The manifest with the shards of its table, if it has one."""
    if sealed.shard_table is None:
        return sealed
    with files.holding([sealed.shard_table]) as root:
        table = ShardTable.read(root / manifest.TABLE_NAME, sealed.identity.spec, where / manifest.TABLE_NAME)
    return sealed.with_table(table)


def _differences(found: Any, expected: Any, field: str = "") -> list[Mismatch]:
    """Every leaf in which two nested dicts differ, by its dotted name."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = list(dict.fromkeys([*found, *expected]))
        return [
            fault
            for key in keys
            for fault in _differences(found.get(key), expected.get(key), f"{field}.{key}".lstrip("."))
        ]
    return [] if found == expected else [Mismatch(field, found, expected)]
