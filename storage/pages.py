"""Bounds the memory that a Parquet file takes, before any of it is decoded.

The sizes in a footer cannot be trusted: pages are read by their own headers, and a header that claims
gigabytes gets them. So all headers are read first, and only pages of the kind that shards have are accepted:
of data, version 1, PLAIN or BYTE_STREAM_SPLIT, no dictionaries. A header is a struct of Thrift's compact
protocol (apache/parquet-format, parquet.thrift: PageHeader), of which a small part is needed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow.parquet as pq

MAX_CONTAINERS = 10_000  # row groups, columns, ... that a footer may list; more are refused
MOST_EXPANDED = 100  # a file may take this many times its size in memory, ...
ALWAYS_FINE = 2**28  # ... and this many bytes in any case: equal values compress well
MAX_HEADER_BYTES = 2**14
DATA_PAGE, PLAIN, BYTE_STREAM_SPLIT = 0, 0, 9
LARGEST_NUMBER = 8  # bytes of a decoded number, or of its place in its lists


class _Page(NamedTuple):
    values: int
    compressed: int  # bytes
    uncompressed: int  # bytes


def open_bounded(path: Path) -> pq.ParquetFile:
    """The Parquet file at `path`, opened to be read with page checksums.

    Raises ValueError where it would take far more memory than it has bytes, or has pages that no shard has.
    """
    size = path.stat().st_size
    file = pq.ParquetFile(
        path,
        page_checksum_verification=True,
        thrift_container_size_limit=MAX_CONTAINERS,
    )
    needed, most = 0, max(ALWAYS_FINE, MOST_EXPANDED * size)
    with path.open("rb") as raw:
        for group in (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)):
            for column in (group.column(i) for i in range(group.num_columns)):
                if column.has_dictionary_page:
                    raise ValueError(f"column {column.path_in_schema} has a dictionary")
                first, left = column.data_page_offset, column.num_values
                for page in _pages(raw, first, first + column.total_compressed_size):
                    needed += page.uncompressed + LARGEST_NUMBER * page.values
                    left -= page.values
                    if needed > most:
                        raise ValueError(f"its {size:,} bytes would take more than {most:,} in memory")
                if left:
                    raise ValueError(
                        f"pages of {column.path_in_schema} have another number of values than its footer"
                    )
                if column.num_values < group.num_rows:
                    raise ValueError(f"{column.path_in_schema} has fewer values than there are rows")
    return file


def _pages(raw: IO[bytes], start: int, end: int) -> Iterator[_Page]:
    """The pages between two offsets of a file. Raises ValueError for a page that no shard has."""
    while start < end:
        raw.seek(start)
        header = _Compact(raw.read(MAX_HEADER_BYTES))
        try:
            fields = header.struct()
            data = fields[5]
            page = _Page(data[1], fields[3], fields[2])
            known = fields[1] == DATA_PAGE and data[2] in (PLAIN, BYTE_STREAM_SPLIT)
        except (IndexError, KeyError, TypeError):
            raise ValueError(f"byte {start:,} does not start a data page") from None
        if not known or min(page) < 0:
            raise ValueError(f"the page at byte {start:,} is not of a kind that shards have")
        yield page
        start += header.at + page.compressed
    if start != end:
        raise ValueError(f"a page ends at byte {start:,}, its column at {end:,}")


class _Compact:
    """A cursor over bytes in Thrift's compact protocol. Raises IndexError past the end."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def struct(self, depth: int = 3) -> dict[int, Any]:
        """The fields of a struct by number: integers and structs; None for other types."""
        if depth < 0:
            raise IndexError("structs within structs")
        found: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._integer()
            found[number] = self._value(kind & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # booleans are encoded in their type
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 8:  # bytes: a minimum or maximum
            length = self._varint()
            self.at += length
            return None
        if kind == 12:
            return self.struct(depth - 1)
        raise IndexError(f"a value of type {kind}")

    def _byte(self) -> int:
        self.at += 1
        return self.raw[self.at - 1]

    def _varint(self) -> int:
        number, shift = 0, 0
        while shift < 64:
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
            shift += 7
        raise IndexError("a number without an end")

    def _integer(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)
