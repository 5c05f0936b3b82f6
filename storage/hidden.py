"""Hidden shards: one Zarr v3 group a shard, one [rows, width] array a layer, row for row beside the logits.

zarr writes them and reads them back. Two of its defaults would hide damage, so both are turned off here: a
missing chunk reads as NaN and not as zeros, and every chunk carries a crc32c. Files a shard: zarr.json, and
for each layer
`layer.<n>/zarr.json` and one shard file `layer.<n>/c.0.0`.

Shape letters: N rows, W width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from storage.errors import ShardCorrupt
from storage.spec import HiddenSpec

CHUNK_BYTES = 512 * 1024  # inner chunks: one read, one crc


def write(group_dir: Path, states: Mapping[int, npt.NDArray[Any]], spec: HiddenSpec) -> None:
    """Write the states of one shard, {layer: [N, W]}, as `spec.dtype`. Each array is written whole, once."""
    group = zarr.create_group(group_dir, zarr_format=3, attributes={"pool": spec.pool})
    dtype = np.dtype(spec.dtype)
    chunk_rows = max(1, CHUNK_BYTES // (spec.width * dtype.itemsize))
    for layer in spec.layers:
        with np.errstate(over="ignore"):
            states_NW = np.ascontiguousarray(states[layer], dtype)
        if not np.isfinite(states_NW).all():
            raise ValueError(
                f"states of layer {layer} do not fit {spec.dtype}: keep them as float32 (hidden.dtype)"
            )
        num_rows = len(states_NW)
        rows = min(chunk_rows, num_rows)
        array = group.create_array(
            f"layer.{layer}",
            shape=states_NW.shape,
            dtype=dtype,
            chunks=(rows, spec.width),
            shards=(-(-num_rows // rows) * rows, spec.width),  # zarr wants whole chunks a shard
            serializer=BytesCodec(),
            compressors=Crc32cCodec(),
            fill_value=np.nan,
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
        )
        array[:] = states_NW


def read(group_dir: Path, layer: int, num_rows: int, spec: HiddenSpec) -> npt.NDArray[Any]:
    """The [N, W] states of one layer. Raises ShardCorrupt for another shape or dtype, or a bad checksum."""
    try:
        array = zarr.open_array(group_dir / f"layer.{layer}", mode="r", zarr_format=3)
        if array.shape != (num_rows, spec.width) or array.dtype != np.dtype(spec.dtype):
            raise ValueError(
                f"found {array.dtype}{list(array.shape)}, expected {spec.dtype}[{num_rows}, {spec.width}]"
            )
        return np.asarray(array[:])
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ShardCorrupt(f"{group_dir}/layer.{layer} cannot be read as Zarr: {error}") from error
