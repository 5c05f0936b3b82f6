"""`Cache`: the door through which everything reads a sealed cache."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage import hidden, manifest, records
from storage.compact import Ranks
from storage.errors import Mismatch, ShardCorrupt, SpecMismatch
from storage.hidden import Basis
from storage.manifest import Manifest, ShardEntry
from storage.spec import Identity, SparseCodec, content_fingerprint, sha256_json
from storage.verify import AGAIN, check_files, check_sizes, refuse_stray


class Cache:
    """A sealed cache. Nothing that it returns is unchecked: a file's digest is compared before it is used."""

    def __init__(self, path: Path, sealed: Manifest) -> None:
        self.path = path
        self.manifest = sealed
        self._checked: set[str] = set()

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The cache at `path`: its manifest is sound, each file that it lists is there with its size.

        Raises NoManifest, ManifestInvalid, FormatTooNew, ShardMissing or ShardTruncated.
        """
        path = Path(path)
        sealed = manifest.load(path)
        check_sizes(path, sealed.files)
        return cls(path, sealed)

    @property
    def identity(self) -> Identity:
        """Who was asked, and what was kept."""
        return self.manifest.identity

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the logits; empty for a language model, and for vectors."""
        return self.identity.spec.labels

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return self.manifest.num_rows

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """The shards, in order."""
        return self.manifest.shards

    @property
    def hidden_names(self) -> tuple[str, ...]:
        """The vectors of the teacher that are kept: `layer.<n>` for states (0 = embeddings), `qkv.<n>` for
        queries, keys and values (1 = the first block); empty where none are.
        """
        return self.identity.spec.hidden.names if self.identity.spec.hidden else ()

    @property
    def hidden_per_position(self) -> bool:
        """Whether there is a vector for each token, and not one for all of a row."""
        return self.identity.spec.hidden is not None and self.identity.spec.hidden.pool == "none"

    @property
    def tokenizer_dir(self) -> Path:
        """The directory of the teacher's tokenizer files, checked; it holds no others."""
        refuse_stray(self.path, {file.path for file in self.manifest.tokenizer_files}, manifest.TOKENIZER_DIR)
        self._check(manifest.TOKENIZER_DIR, self.manifest.tokenizer_files)
        return self.path / manifest.TOKENIZER_DIR

    @property
    def weights_layers(self) -> tuple[int, ...]:
        """The teacher's layers whose weights the cache carries (0 = the first); empty where it has none."""
        return self.manifest.weights.layers if self.manifest.weights else ()

    @property
    def weights_dir(self) -> Path:
        """The directory of the teacher's weights, checked; it holds nothing else. Raises SpecMismatch where
        the cache has none.
        """
        if self.manifest.weights is None:
            raise SpecMismatch(
                f"{self.path} carries no weights of its teacher",
                [Mismatch("weights", "none", "some layers")],
                f"Write weights: {{layers: [...]}} under caches.{self.path.name} in params.yaml and run "
                f"`dvc repro cache@{self.path.name}`: the teacher is not asked again.",
            )
        refuse_stray(self.path, set(manifest.WEIGHTS_FILES), manifest.WEIGHTS_DIR)
        self._check(manifest.WEIGHTS_DIR, self.manifest.weights.files)
        return self.path / manifest.WEIGHTS_DIR

    @property
    def manifest_sha256(self) -> str:
        """sha256 hex of manifest.json: it stands for every byte of the cache."""
        return sha256_json(manifest.fields(self.manifest))

    @property
    def codec(self) -> Literal["dense"] | SparseCodec:
        """How the teacher's words are kept."""
        return self.identity.spec.codec

    @property
    def ranks(self) -> Ranks:
        """The order of the vocabulary in which compact shards number ids; the ids themselves elsewhere."""
        frequent = np.array(self.manifest.ranks or (), np.int64)
        return Ranks(frequent, self.identity.spec.num_outputs)

    def read(self, shard: ShardEntry) -> records.LogitRows | records.EntryRows:
        """The rows of one shard: logits where the codec is dense (of each row, or of each token), entries
        where it is sparse, whatever their layout. Raises ShardMissing, ShardTruncated or ShardCorrupt.
        """
        path = self.path / shard.logits_path
        self._check(shard.logits_path, [file for file in shard.files if file.path == shard.logits_path])
        rows: records.LogitRows | records.EntryRows
        if self.codec == "dense":
            spec = self.identity.spec
            rows = records.read(path, spec.num_outputs, spec.per_position, spec.column)
        else:
            rows = records.read_sparse(path, self.codec, self.ranks, self.identity.spec.per_position)
        found = (len(rows.row_ids), int(rows.num_tokens.sum()), sha256_json(rows.input_hashes.to_pylist()))
        if found != (shard.rows, shard.positions, shard.inputs):
            raise ShardCorrupt(
                f"{path} is not the shard that the manifest describes.\n"
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
        """The vectors of one of `hidden_names`, beside `read(shard)`: [rows, W], or [positions, W] row after
        row. With pca W is the number of components, and of queries, keys and values three widths.

        Raises ValueError for a name that was not kept, and what `read` raises for damage.
        """
        spec = self.identity.spec.hidden
        if spec is None or name not in spec.names:
            raise ValueError(f"{self.path} keeps the hidden states {list(self.hidden_names)}, not {name}")
        self._check(shard.hidden_path, [file for file in shard.files if file.path != shard.logits_path])
        num = shard.positions if self.hidden_per_position else shard.rows
        return hidden.read(self.path / shard.hidden_path, name, num, spec)

    def hidden_basis(self, name: str) -> Basis:
        """(mean [W], axes [m, W]) of one of `hidden_names`: a state is about mean + components @ axes.

        Raises ValueError for a name whose vectors are kept as they are, and what `read` raises for damage.
        """
        spec = self.identity.spec.hidden
        if spec is None or self.manifest.hidden_basis is None or name not in spec.component_names:
            raise ValueError(f"{self.path} does not keep {name} as principal components: it needs no basis")
        self._check(manifest.BASIS_DIR, self.manifest.hidden_basis)
        bases = hidden.read_bases(self.path / manifest.BASIS_DIR, spec)
        if (found := hidden.fingerprint(bases)) != spec.basis:
            raise ShardCorrupt(
                f"{self.path / manifest.BASIS_DIR} is not the basis that the components were made with.\n"
                f"  found    {found}\n  expected {spec.basis}\n{AGAIN}"
            )
        return bases[name]

    def input_hashes(self) -> pa.StringArray:
        """The hashes of what the teacher read of each row, in cache order."""
        return pa.concat_arrays([self._columns(shard, "input_hash")[0] for shard in self.shards])

    def row_ids(self) -> pa.StringArray:
        """The ids of all rows, in cache order."""
        return self.index()[0]

    def index(self) -> tuple[pa.StringArray, npt.NDArray[np.int32]]:
        """(ids, numbers of tokens) of all rows, in cache order, without decoding a target."""
        parts = [self._columns(shard, "row_id", "num_tokens") for shard in self.shards]
        lengths = np.concatenate([lengths.to_numpy() for _, lengths in parts])
        return pa.concat_arrays([ids for ids, _ in parts]), lengths

    def _columns(self, shard: ShardEntry, *names: str) -> list[pa.Array]:
        self._check(shard.logits_path, [file for file in shard.files if file.path == shard.logits_path])
        return records.read_columns(self.path / shard.logits_path, *names)

    def check(
        self,
        what: str,
        *,
        identity: Identity | None = None,
        labels: Iterable[str] | None = None,
        row_ids: pa.StringArray | None = None,
        whole: bool = False,
        advice: str = "Choose a cache that was made for this data, or rebuild it.",
    ) -> None:
        """Refuse the cache where it does not fit `what`, with every field that differs.

        `identity`: the teacher, tokenizer and spec that it should come from. `labels`: class names in order.
        `row_ids`: rows that must all have a target; with `whole`, the cache must hold these rows and no
        others. Raises SpecMismatch.
        """
        faults: list[Mismatch] = []
        if identity is not None:
            faults += _differences(self.identity.model_dump(), identity.model_dump())
        if labels is not None and list(labels) != list(self.labels):
            faults.append(Mismatch("dataset.labels", list(self.labels), list(labels)))
        if row_ids is not None:
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

    def _check(self, name: str, files: Iterable[manifest.FileEntry]) -> None:
        if name not in self._checked:
            check_files(self.path, files)
            self._checked.add(name)


def _differences(found: Any, expected: Any, field: str = "") -> list[Mismatch]:
    """Every leaf in which two nested descriptions differ, by its dotted name."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = list(dict.fromkeys([*found, *expected]))
        return [
            fault
            for key in keys
            for fault in _differences(found.get(key), expected.get(key), f"{field}.{key}".lstrip("."))
        ]
    return [] if found == expected else [Mismatch(field, found, expected)]
