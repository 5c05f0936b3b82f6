"""Decoded shards in a scratch file: one epoch decodes Parquet, later epochs read the arrays.

Shards are small and checked; decoding them costs several times what making batches of them does. The scratch
file has no name and belongs to one process: it disappears with the process, however that ends, so nothing in
it is stale and nothing is checked again. A shard that does not fit is decoded each time.
"""

import os
import tempfile
import threading
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SCRATCH = Path(".stillroom")
ALIGNED = 64  # bytes at which an array begins

Arrays = Mapping[str, npt.NDArray[Any]]


class _Stored(NamedTuple):
    """Where the arrays of one shard are in the file."""

    start: int
    num_bytes: int
    layout: tuple[tuple[str, np.dtype[Any], tuple[int, ...], int], ...]  # name, dtype, shape, first byte


class DecodedShards:
    """At most `max_bytes` of arrays on the disk of `directory`, for any number of threads of one process."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self._lock = threading.Lock()
        self._handle, self._owner, self._end = -1, 0, 0
        self._kept: dict[Hashable, _Stored] = {}

    def put(self, key: Hashable, arrays: Arrays) -> None:
        """Store these arrays under a new key; does nothing where they do not fit."""
        layout, size = [], 0
        for name, array in arrays.items():
            first = _aligned(size)
            layout.append((name, array.dtype, array.shape, first))
            size = first + array.nbytes if array.nbytes else size
        try:
            with self._lock:
                if not self.max_bytes:
                    return
                self._open()
                start = self._end
                if start + size > self.max_bytes or key in self._kept:
                    return
                self._end = _aligned(start + size)
            for array, (_, _, _, first) in zip(arrays.values(), layout, strict=True):
                _write(self._handle, np.ascontiguousarray(array).reshape(-1).view(np.uint8), start + first)
        except OSError:  # a full or read-only disk does not end the training; stored arrays stay
            self.max_bytes = 0
            return
        with self._lock:
            self._kept[key] = _Stored(start, size, tuple(layout))

    def get(self, key: Hashable) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays under a key, as copies in memory; None where there are none."""
        with self._lock:
            kept = self._kept.get(key) if self._owner == os.getpid() else None
        if kept is None:
            return None
        held = np.empty(kept.num_bytes, np.uint8)
        done = 0
        while done < len(held):
            num = os.preadv(self._handle, [held.data[done:]], kept.start + done)
            if num == 0:
                raise OSError(f"the scratch file in {self.directory} has lost its end")
            done += num
        found = {}
        for name, dtype, shape, first in kept.layout:
            num = int(np.prod(shape)) * dtype.itemsize
            found[name] = held[first : first + num].view(dtype).reshape(shape)
        return found

    def _open(self) -> None:
        """Open a file of this process: a forked one would write over the file of its parent."""
        if self._owner == os.getpid():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._handle >= 0:
            os.close(self._handle)
        with tempfile.TemporaryFile(dir=self.directory) as file:
            self._handle = os.dup(file.fileno())
        self._owner, self._end, self._kept = os.getpid(), 0, {}

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNED) * ALIGNED


def _write(handle: int, data: npt.NDArray[np.uint8], start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data.data[done:], start + done)
