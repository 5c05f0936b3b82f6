"""Logit shards: Parquet that pandas, DuckDB, Polars and `datasets` read without us.

One row of the file is one row of the dataset, in dataset order:
    row_id      string        32 hex characters, storage.spec.row_id
    input_hash  string        32 hex characters, storage.spec.input_hash of the token ids that the teacher
    read
    num_tokens  int32         how many token ids it read
    logits      float32[C]    the teacher's logits before any softmax, in label order (a fixed-size list)

Shape letters: N rows, C classes.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import ShardCorrupt
from storage.spec import canonical_json

ROW_GROUP_ROWS = 16_384  # about 1 MB encoded for a handful of classes; never read single rows


class LogitRows(NamedTuple):
    """Rows of one logit shard, in file order."""

    row_ids: pa.StringArray  # N
    input_hashes: pa.StringArray  # N
    num_tokens: npt.NDArray[np.int32]  # N, tokens
    logits: npt.NDArray[np.float32]  # N x C, nats before normalisation


def schema(num_classes: int, labels: tuple[str, ...] = ()) -> pa.Schema:
    """The Arrow schema of a logit shard; label names go into the metadata (stillroom.labels)."""
    fields = [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("input_hash", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field(
            "logits", pa.list_(pa.field("element", pa.float32(), nullable=False), num_classes), nullable=False
        ),
    ]
    return pa.schema(fields, metadata={"stillroom.labels": canonical_json(list(labels)).decode()})


def write(path: Path, rows: LogitRows, labels: tuple[str, ...]) -> None:
    """Write one shard. The same rows give the same bytes (for one version of pyarrow)."""
    layout = schema(rows.logits.shape[1], labels)
    logits = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(rows.logits).reshape(-1)), type=layout.field("logits").type
    )
    table = pa.Table.from_arrays(
        [rows.row_ids, rows.input_hashes, pa.array(rows.num_tokens, pa.int32()), logits], schema=layout
    )
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding={"num_tokens": "BYTE_STREAM_SPLIT", "logits.list.element": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,
    )


def read(path: Path, num_classes: int) -> LogitRows:
    """All rows of one shard. Raises ShardCorrupt for anything but a file of `schema(num_classes)`."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardCorrupt(f"{path} cannot be read as Parquet: {error}") from error
    expected = schema(num_classes)
    if not table.schema.equals(expected, check_metadata=False):
        raise ShardCorrupt(
            f"{path} has another layout.\n  found    {table.schema.types}\n  expected {expected.types}"
        )
    table = table.combine_chunks()
    columns = [table.column(name).combine_chunks() for name in table.column_names]
    # flatten() respects slices and offsets; .values would not (a classic wrong-rows bug)
    logits = columns[3].flatten().to_numpy(zero_copy_only=True).reshape(len(table), num_classes)
    return LogitRows(columns[0], columns[1], columns[2].to_numpy(), logits)
