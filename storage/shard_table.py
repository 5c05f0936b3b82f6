"""The shards of a cache with more than MOST_LISTED: a Parquet file instead of a list in manifest.json.

A list of a million shards would be half a gigabyte of JSON, and a million objects. Here a shard is a row of a
few arrays, and becomes a ShardEntry when it is read. The names of a shard's files follow from the cache's
spec; the table has their sizes and digests. docs/cache-format.md specifies its columns.

Shape letters: S shards, F files of a shard.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import ManifestInvalid
from storage.manifest import FileEntry, ShardEntry
from storage.spec import Spec

DIGEST = pa.binary(32)
GROUP_SHARDS = 2**16
MOST_ROWS, MOST = 2**31, 2**53  # of a shard; of any count

Counts = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint8]


class Columns(NamedTuple):
    """The table, column by column."""

    keys: Digests  # S x 32
    rows: Counts  # S
    positions: Counts  # S
    inputs: Digests  # S x 32
    sizes: Counts  # F x S, bytes
    digests: Digests  # F x S x 32


class ShardTable(Sequence[ShardEntry]):
    """The shards of a cache of this spec, in order."""

    def __init__(self, spec: Spec, columns: Columns) -> None:
        self.names, self.columns = file_names(spec), columns

    @classmethod
    def of(cls, spec: Spec, shards: Sequence[ShardEntry]) -> "ShardTable":
        """The table of these shards."""
        paths = file_names(spec)
        files = [{file.path: file for file in shard.files} for shard in shards]
        own = [
            [held[path.replace("*", shard.key)] for shard, held in zip(shards, files, strict=True)]
            for path in paths
        ]
        columns = Columns(
            _bytes(shard.key for shard in shards),
            np.array([shard.rows for shard in shards], np.int64),
            np.array([shard.positions for shard in shards], np.int64),
            _bytes(shard.inputs for shard in shards),
            np.array([[file.bytes for file in column] for column in own], np.int64),
            np.stack([_bytes(file.sha256 for file in column) for column in own]),
        )
        return cls(spec, columns)

    def __len__(self) -> int:
        return len(self.columns.rows)

    @overload
    def __getitem__(self, at: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[ShardEntry, ...]: ...
    def __getitem__(self, at: int | slice) -> ShardEntry | tuple[ShardEntry, ...]:
        if isinstance(at, slice):
            return tuple(self[i] for i in range(*at.indices(len(self))))
        c, key = self.columns, self.columns.keys[at].tobytes().hex()
        files = tuple(
            FileEntry.model_construct(
                path=name.replace("*", key), bytes=int(size), sha256=digest.tobytes().hex()
            )
            for name, size, digest in zip(self.names, c.sizes[:, at], c.digests[:, at], strict=True)
        )
        return ShardEntry.model_construct(
            key=key,
            rows=int(c.rows[at]),
            positions=int(c.positions[at]),
            inputs=c.inputs[at].tobytes().hex(),
            files=files,
        )

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[at] for at in range(len(self)))

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return int(self.columns.rows.sum())

    def largest_piece(self) -> int:
        """Bytes of the largest files that are read together: a Parquet file, or hidden states."""
        states = self.columns.sizes[:-1].sum(axis=0)
        return int(max(self.columns.sizes[-1].max(initial=0), states.max(initial=0)))

    def write(self, path: Path) -> None:
        """Write the table. The same shards give the same bytes (for one version of pyarrow)."""
        c, layout = self.columns, _schema(len(self.names))
        arrays = [_array(values, field.type) for values, field in zip(_flat(c), layout, strict=True)]
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=layout), path, row_group_size=GROUP_SHARDS,
            compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True,
        )  # fmt: skip

    @classmethod
    def read(cls, path: Path, spec: Spec, where: object) -> "ShardTable":
        """The table in `path`, whose digest the manifest has checked; messages call it `where`.

        Raises ManifestInvalid for a file with other columns, or with impossible numbers.
        """
        names, again = file_names(spec), "Copy the cache again, or rebuild it."
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
            if not file.schema_arrow.equals(_schema(len(names))):
                raise ValueError(f"its columns are {file.schema_arrow.names}")
            num, size = file.metadata.num_rows, path.stat().st_size
            if num * (80 + 40 * len(names)) > size:
                raise ValueError(f"{size:,} bytes are too few for {num:,} shards")
            c = _empty(num, len(names))
            first = 0
            for group in range(file.num_row_groups):
                part = file.read_row_group(group, use_threads=False)
                last = first + len(part)
                for target, column in zip(_flat(c), part.columns, strict=True):
                    target[first:last] = _numbers(column.combine_chunks(), target)
                first = last
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise ManifestInvalid(f"{where} is not a table of shards: {error}.\n{again}") from error
        if fault := _fault(c):
            raise ManifestInvalid(f"{where}: {fault}.\n{again}")
        return cls(spec, c)


def file_names(spec: Spec) -> tuple[str, ...]:
    """The files of a shard of this spec, `*` for its key; the Parquet file is the last one."""
    states = [] if spec.hidden is None else [f"hidden/*/{file}" for file in spec.hidden.files]
    return (*sorted(states, key=lambda path: path.split("/")), "logits/*.parquet")


def _schema(num_files: int) -> pa.Schema:
    fields = {"key": DIGEST, "rows": pa.int64(), "positions": pa.int64(), "inputs": DIGEST}
    for file in range(num_files):
        fields |= {f"bytes.{file}": pa.int64(), f"sha256.{file}": DIGEST}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields.items()])


def _empty(shards: int, files: int) -> Columns:
    return Columns(
        np.empty((shards, 32), np.uint8), np.empty(shards, np.int64), np.empty(shards, np.int64),
        np.empty((shards, 32), np.uint8), np.empty((files, shards), np.int64),
        np.empty((files, shards, 32), np.uint8),
    )  # fmt: skip


def _flat(c: Columns) -> list[npt.NDArray[Any]]:
    """The arrays in the order of the file's columns."""
    columns: list[npt.NDArray[Any]] = [c.keys, c.rows, c.positions, c.inputs]
    for sizes, digests in zip(c.sizes, c.digests, strict=True):
        columns += [sizes, digests]
    return columns


def _array(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values, kind)
    data = pa.py_buffer(np.ascontiguousarray(values).data)
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, data])


def _numbers(column: pa.Array, target: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if target.ndim == 1:
        return np.asarray(column.to_numpy())
    flat = np.frombuffer(column.buffers()[1], np.uint8)
    return flat[32 * column.offset : 32 * (column.offset + len(column))].reshape(-1, 32)


def _fault(c: Columns) -> str | None:
    """What is impossible in these columns; None for nothing."""
    if not len(c.rows):
        return "it has no shard"
    if c.rows.min() < 1 or c.rows.max() > MOST_ROWS:
        return "a shard has less than one row, or too many"
    if min(c.positions.min(), c.sizes.min()) < 0 or max(c.positions.max(), c.sizes.max()) > MOST:
        return "a number of positions or bytes is negative or too large"
    words = np.sort(c.keys.view(np.uint64)[:, 0])
    if (words[1:] == words[:-1]).any() and len({bytes(key) for key in c.keys}) < len(c.keys):
        return "a shard is listed twice"
    return None


def _bytes(names: Any) -> Digests:
    """Digests [S, 32] of names of 64 hex characters each."""
    return np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, 32)
