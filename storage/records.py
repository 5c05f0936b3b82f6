"""Logit shards: Parquet files that pandas, DuckDB, Polars and `datasets` read without this package.

One row of the file is one row of the dataset, in dataset order. Every shard has
    row_id      string    32 hex characters, storage.fingerprints.row_id
    input_hash  string    32 hex characters, storage.fingerprints.input_hash of the teacher's token ids
    num_tokens  int32     number of these token ids; 1 for an image
then, for targets a token, `token_ids` int32; and then the targets: `logits` float32[C] (dense; `values` or
`embedding` for other numbers than logits; a list of them for targets a token), or lists over the positions
and entries of the row (sparse: storage/codecs.py has their columns).

Shape letters: N rows, C classes, P positions of all rows, E entries.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage import pages
from storage.codecs import SparseCodec
from storage.compact import Columns, Ranks
from storage.entries import Entries, ends, ranges
from storage.errors import ShardCorrupt
from storage.fingerprints import canonical_json
from storage.spec import Spec

ROW_GROUP_ROWS = 16_384  # about 1 MB encoded for a handful of classes; single rows are never read
ROW_GROUP_POSITIONS = 2**18  # 4 MB encoded at 15 bytes a position; for dense targets: numbers
FIRST_COLUMNS = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("input_hash", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
    ]
)


class LogitRows(NamedTuple):
    """Rows of one logit shard, in file order."""

    row_ids: pa.StringArray  # N
    input_hashes: pa.StringArray  # N
    num_tokens: npt.NDArray[np.int32]  # N, tokens
    logits: npt.NDArray[np.float32]  # N x C; P x C, row after row, for targets a token; nats
    token_ids: npt.NDArray[np.int32] | None = None  # P, what the teacher read, for targets a token

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """The row that each vector of logits belongs to."""
        rows = np.arange(len(self.row_ids))
        return rows if self.token_ids is None else np.repeat(rows, self.num_tokens)

    def take(self, rows: npt.NDArray[np.int64]) -> "LogitRows":
        """These rows, in this order."""
        at, read = rows, None
        if self.token_ids is not None:
            at = ranges(ends(self.num_tokens)[rows], self.num_tokens[rows].astype(np.int64))
            read = self.token_ids[at]
        return LogitRows(
            self.row_ids.take(pa.array(rows)), self.input_hashes.take(pa.array(rows)), self.num_tokens[rows],
            self.logits[at], read,
        )  # fmt: skip


class EntryRows(NamedTuple):
    """Rows of one shard of sparse targets, in file order."""

    row_ids: pa.StringArray  # N
    input_hashes: pa.StringArray  # N
    num_tokens: npt.NDArray[np.int32]  # N, tokens
    num_positions: npt.NDArray[np.int32]  # N, positions with or without entries
    entries: Entries  # P positions, row after row
    # For targets a token: what the teacher read, and the entropy of its distributions.
    token_ids: npt.NDArray[np.int32] | None = None  # tokens of all rows
    entropy: npt.NDArray[np.float32] | None = None  # N, nats, summed over the row's targets

    def take(self, rows: npt.NDArray[np.int64]) -> "EntryRows":
        """These rows, in this order."""
        first = ends(self.num_positions)
        positions = ranges(first[rows], self.num_positions[rows].astype(np.int64))
        tokens = entropy = None
        if self.token_ids is not None and self.entropy is not None:
            entropy = self.entropy[rows]
            lengths = self.num_tokens[rows].astype(np.int64)
            tokens = self.token_ids[ranges(ends(self.num_tokens)[rows], lengths)]
        return EntryRows(
            self.row_ids.take(pa.array(rows)), self.input_hashes.take(pa.array(rows)), self.num_tokens[rows],
            self.num_positions[rows], self.entries.take(positions), tokens, entropy,
        )  # fmt: skip


def schema(
    num_classes: int, labels: tuple[str, ...] = (), tokens: bool = False, column: str = "logits"
) -> pa.Schema:
    """The Arrow schema of a shard of dense targets, one a row (in `column`) or one a token. Label names are
    in its metadata (stillroom.labels).
    """
    logits = pa.list_(_element(pa.float32()), num_classes)
    if not tokens:
        return _schema({column: logits}, labels)
    return _schema(
        {"token_ids": pa.list_(_element(pa.int32())), "logits": pa.list_(_element(logits))}, labels
    )


def sparse_schema(codec: SparseCodec, labels: tuple[str, ...] = (), tokens: bool = False) -> pa.Schema:
    """The Arrow schema of a shard of sparse targets: lists of small numbers.

    With `tokens`, for targets a token, `entropy` and `token_ids` come before them.
    """
    kinds = {"token_ids": pa.int32()} if tokens else {}
    kinds |= {name: column.kind for name, column in codec.columns.items()}
    lists = {name: pa.list_(_element(kind)) for name, kind in kinds.items()}
    return _schema({"entropy": pa.float32(), **lists} if tokens else lists, labels)


def layout(spec: Spec) -> pa.Schema:
    """The Arrow schema of the shards of a cache."""
    if spec.sparse is None:
        return schema(spec.num_outputs, spec.labels, spec.per_position, spec.column)
    return sparse_schema(spec.sparse, spec.labels, spec.per_position)


def read_table(path: Path, spec: Spec) -> pa.Table:
    """The columns of a shard, not decoded. Raises ShardCorrupt for anything but a file of `layout`."""
    return _table(path, layout(spec))


def write_table(path: Path, table: pa.Table, spec: Spec) -> None:
    """Write rows of `read_table`s: the same bytes that `write` and `write_sparse` write for them."""
    import pyarrow.compute as pc  # reading does not need it

    group_rows = ROW_GROUP_ROWS
    if spec.sparse is not None:
        a_position = table.column(spec.sparse.position_column)
        group_rows = _group_rows(len(table), pc.sum(pc.list_value_length(a_position)).as_py())
    elif spec.per_position:
        numbers = pc.sum(table.column("num_tokens")).as_py() * spec.num_outputs
        group_rows = _group_rows(len(table), numbers)
    table = pa.Table.from_arrays([c.combine_chunks() for c in table.columns], schema=layout(spec))
    _write(path, table, level=3 if spec.sparse is None else 1, row_group_rows=group_rows)


def write(path: Path, rows: LogitRows, labels: tuple[str, ...], column: str = "logits") -> None:
    """Write one shard of dense targets, in the column `column`.

    The same rows give the same bytes (for one version of pyarrow).
    """
    tokens = rows.token_ids is not None
    layout, group_rows = schema(rows.logits.shape[1], labels, tokens, column), ROW_GROUP_ROWS
    targets = layout.field(column).type
    logits = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(rows.logits).reshape(-1)),
        type=targets.value_type if tokens else targets,
    )
    columns = [rows.row_ids, rows.input_hashes, pa.array(rows.num_tokens, pa.int32()), logits]
    if tokens:
        first = pa.array(ends(rows.num_tokens), pa.int32())
        read = pa.ListArray.from_arrays(
            first, pa.array(rows.token_ids, pa.int32()), type=layout.field("token_ids").type
        )
        columns[3:] = [read, pa.ListArray.from_arrays(first, logits, type=targets)]
        group_rows = _group_rows(len(rows.row_ids), rows.logits.size)
    _write(path, pa.Table.from_arrays(columns, schema=layout), level=3, row_group_rows=group_rows)


def write_sparse(
    path: Path, rows: EntryRows, codec: SparseCodec, labels: tuple[str, ...], packed: Columns | None
) -> None:
    """Write one shard of sparse targets. `packed`: what `codec.pack` returned; None for a plain layout."""
    layout = sparse_schema(codec, labels, tokens=rows.token_ids is not None)
    values = dict(packed if packed is not None else codec.pack(rows.entries))
    if rows.token_ids is not None:
        values["token_ids"] = rows.token_ids
    columns = [rows.row_ids, rows.input_hashes, pa.array(rows.num_tokens, pa.int32())]
    first = ends(rows.num_positions)
    if rows.entropy is not None:
        columns.append(pa.array(rows.entropy, pa.float32()))
    for field in layout:
        if not pa.types.is_list(field.type):
            continue
        if field.name == "token_ids":
            offsets = ends(rows.num_tokens)
        else:
            counted_by = codec.columns[field.name].counted_by
            offsets = first if counted_by is None else ends(values[counted_by])[first]
        data = pa.array(values[field.name], field.type.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), data, type=field.type))
    group_rows = _group_rows(len(rows.row_ids), int(first[-1]))
    _write(path, pa.Table.from_arrays(columns, schema=layout), level=1, row_group_rows=group_rows)


def read(path: Path, num_classes: int, tokens: bool = False, column: str = "logits") -> LogitRows:
    """All rows of one dense shard. Raises ShardCorrupt for anything but a file of `schema`.

    `tokens`: whether each token of a row has a target, so that the rows have their token ids.
    """
    columns = _read(path, schema(num_classes, tokens=tokens, column=column))
    num_tokens, logits, read_ids = columns["num_tokens"].to_numpy(), columns[column], None
    # flatten() respects slices and offsets; .values would not (a classic wrong-rows bug)
    if tokens:
        _check_lengths(path, columns, num_tokens, "token_ids", "logits")
        read_ids = columns["token_ids"].flatten().to_numpy(zero_copy_only=True)
        logits = logits.flatten()
    dense = logits.flatten().to_numpy(zero_copy_only=True).reshape(-1, num_classes)
    return LogitRows(columns["row_id"], columns["input_hash"], num_tokens, dense, read_ids)


def read_sparse(path: Path, codec: SparseCodec, ranks: Ranks, tokens: bool = False) -> EntryRows:
    """All rows of one sparse shard, whatever its layout. Raises ShardCorrupt for anything else.

    `tokens`: whether its rows have the token ids that the teacher read.
    """
    layout = sparse_schema(codec, tokens=tokens)
    columns = _read(path, layout)
    lists = [field.name for field in layout if pa.types.is_list(field.type)]
    values: Columns = {name: columns[name].flatten().to_numpy(zero_copy_only=True) for name in lists}
    try:
        _check_counts(values, codec)
        entries = codec.unpack(values, ranks)
        _check_entries(entries, ranks.vocab_size)
    except (ValueError, IndexError) as error:
        raise ShardCorrupt(f"{path} does not have {codec.name} targets: {error}.") from error
    num_positions = columns[codec.position_column].value_lengths().to_numpy()
    num_tokens = columns["num_tokens"].to_numpy()
    if tokens:
        _check_lengths(path, columns, num_tokens, "token_ids", codec.position_column)
    entropy = columns["entropy"].to_numpy() if tokens else None
    if entropy is not None and not (np.isfinite(entropy) & (entropy >= -0.01)).all():
        raise ShardCorrupt(f"{path} has rows with an impossible entropy.")
    return EntryRows(
        columns["row_id"], columns["input_hash"], num_tokens, num_positions, entries,
        values.get("token_ids"), entropy,
    )  # fmt: skip


def read_columns(path: Path, *names: str) -> list[pa.Array]:
    """Some of FIRST_COLUMNS of any shard, without its targets. Raises ShardCorrupt."""
    table = _table(path, FIRST_COLUMNS, names)
    return [table.column(name).combine_chunks() for name in names]


def _schema(targets: dict[str, pa.DataType], labels: tuple[str, ...]) -> pa.Schema:
    fields = [*FIRST_COLUMNS, *(pa.field(name, kind, nullable=False) for name, kind in targets.items())]
    return pa.schema(fields, metadata={"stillroom.labels": canonical_json(list(labels)).decode()})


def _element(kind: pa.DataType) -> pa.Field:
    return pa.field("element", kind, nullable=False)


def _write(path: Path, table: pa.Table, level: int, row_group_rows: int) -> None:
    leaves = [_leaf(field.name, field.type) for field in table.schema if pa.types.is_nested(field.type)]
    pq.write_table(
        table,
        path,
        row_group_size=row_group_rows,
        compression="zstd",
        compression_level=level,
        use_dictionary=False,
        column_encoding=dict.fromkeys(["num_tokens", *leaves], "BYTE_STREAM_SPLIT"),
        write_page_checksum=True,
    )


def _leaf(name: str, kind: pa.DataType) -> str:
    """The Parquet name of the numbers inside lists."""
    return _leaf(f"{name}.list.element", kind.value_type) if pa.types.is_nested(kind) else name


def _group_rows(num_rows: int, num_positions: int) -> int:
    return max(1, int(ROW_GROUP_POSITIONS * num_rows / max(num_positions, 1)))


def _read(path: Path, expected: pa.Schema) -> dict[str, pa.Array]:
    table = _table(path, expected)
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def _table(path: Path, expected: pa.Schema, names: Sequence[str] | None = None) -> pa.Table:
    """The columns of `expected`, or those of `names`. Decodes nothing before layout and size are checked."""
    try:
        file = pages.open_bounded(path)
        found = file.schema_arrow
        if names is not None:
            found = pa.schema([found.field(name) for name in expected.names])
        if not found.equals(expected, check_metadata=False):
            raise ValueError(f"it has another layout.\n  found    {found.types}\n  expected {expected.types}")
        return file.read(columns=names).combine_chunks()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise ShardCorrupt(f"{path} cannot be read as Parquet: {error}") from error


def _check_lengths(
    path: Path, columns: dict[str, pa.Array], num_tokens: npt.NDArray[np.int32], *names: str
) -> None:
    for name in names:
        if (columns[name].value_lengths().to_numpy() != num_tokens).any():
            raise ShardCorrupt(f"{path} has rows with another number of {name} than num_tokens.")


def _check_counts(values: Columns, codec: SparseCodec) -> None:
    """Raise ValueError where a list has another number of elements than its column of counts says."""
    for name, column in codec.columns.items():
        if column.counted_by is None:
            continue
        expected = int(values[column.counted_by].sum(dtype=np.int64))
        if len(values[name]) != expected:
            raise ValueError(
                f"{name} has {len(values[name]):,} elements, {column.counted_by} counts {expected:,}"
            )


def _check_entries(entries: Entries, vocab_size: int) -> None:
    if len(entries.ids) and not 0 <= int(entries.ids.min()) <= int(entries.ids.max()) < vocab_size:
        raise ValueError(f"an id is outside the vocabulary of {vocab_size:,}")
    with np.errstate(invalid="ignore"):
        possible = np.all((entries.weights >= 0) & (entries.weights <= 1.001)) and np.all(
            entries.log_tail <= 0.001
        )
    if not possible or np.any(entries.num_exact > entries.counts):
        raise ValueError("a weight is not a probability")
