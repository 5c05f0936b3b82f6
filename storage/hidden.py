"""Hidden shards: one Zarr v3 group a shard, one array of vectors a name, in the order of the shard's rows.

The zarr library writes and reads them. Its defaults would hide damage and are turned off: a missing chunk
reads as NaN (int8: as -128, which no vector has) and not as zeros, and every chunk has a crc32c.
Files a shard: zarr.json, and for each name `<name>/zarr.json` and one shard file `<name>/c.0.0`. int8 has a
second array, `<name>.scale`: the float32 that the numbers of each vector are multiplied by.

For states as principal components, one more group of the cache has `<name>.mean` and `<name>.axes`.

Shape letters: N vectors (of rows, or of positions), W width, M components.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.errors import ShardCorrupt
from storage.spec import HiddenSpec

if TYPE_CHECKING:
    import zarr


CHUNK_BYTES = 512 * 1024  # inner chunks: one read, one crc
MAX_METADATA_BYTES = 2**16  # of a zarr.json
LARGEST, MISSING = 127, -128  # int8 codes: of the largest number of a vector; of a missing number

Floats = npt.NDArray[np.float32]


class Basis(NamedTuple):
    """Mean and principal axes: a state is about mean + components @ axes."""

    mean: Floats  # W
    axes: Floats  # M x W, orthonormal

    def components(self, states_NW: Floats) -> Floats:
        """Components [N, M] of these states along the axes."""
        return np.asarray((states_NW - self.mean) @ self.axes.T, np.float32)


def write(group_dir: Path, states: Mapping[str, Floats], spec: HiddenSpec) -> None:
    """Write the vectors of one shard, {name: [N, W]}, as `spec.dtype`. Each array is written whole, once.

    Raises ValueError for a number that is not finite in that dtype.
    """
    import zarr

    group = zarr.create_group(group_dir, zarr_format=3, attributes={"pool": spec.pool})
    for name in spec.names:
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(
                states[name], np.dtype("float32" if spec.dtype == "int8" else spec.dtype)
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"states of {name} do not fit {spec.dtype}: store them as float32 (hidden.dtype)"
            )
        if spec.dtype == "int8":
            codes, scale = encode(values)
            _write(group, name, codes, MISSING)
            _write(group, f"{name}.scale", scale, np.nan)
        else:
            _write(group, name, values, np.nan)


def read(group_dir: Path, name: str, num: int, spec: HiddenSpec) -> Floats:
    """The [N, W] vectors of one name. Raises ShardCorrupt for another shape or dtype, or a bad checksum."""
    shape = (num, spec.kept_width(name))
    values = _read(group_dir, name, shape, spec.dtype)
    if spec.dtype != "int8":
        return values.astype(np.float32, copy=False)
    scale = _read(group_dir, f"{name}.scale", shape[:1], "float32")
    if (values == MISSING).any() or not (np.isfinite(scale) & (scale > 0)).all():
        raise ShardCorrupt(f"{group_dir}/{name} has vectors without a scale, or numbers that are missing")
    decoded: Floats = values * scale[:, None]
    return decoded


def read_arrays(group_dir: Path, num: int, spec: HiddenSpec) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a shard, not decoded, each of `num` vectors. Raises ShardCorrupt."""
    arrays = {}
    for name in spec.names:
        arrays[name] = _read(group_dir, name, (num, spec.kept_width(name)), spec.dtype)
        if spec.dtype == "int8":
            arrays[f"{name}.scale"] = _read(group_dir, f"{name}.scale", (num,), "float32")
    return arrays


def write_arrays(group_dir: Path, arrays: Mapping[str, npt.NDArray[Any]], spec: HiddenSpec) -> None:
    """Write vectors of `read_arrays`: the same bytes that `write` writes for them."""
    import zarr

    group = zarr.create_group(group_dir, zarr_format=3, attributes={"pool": spec.pool})
    for name, values in arrays.items():
        _write(group, name, values, MISSING if values.dtype == np.int8 else np.nan)


def encode(values_NW: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """(codes [N, W], scales [N]): each vector over its largest number / 127. Errors are at most scale / 2."""
    largest = np.abs(values_NW).max(axis=1, initial=0)
    scale = np.maximum(largest / np.float32(LARGEST), np.finfo(np.float32).tiny)
    codes = np.rint(values_NW / scale[:, None].astype(np.float64))
    return codes.astype(np.int8), scale


def write_bases(group_dir: Path, bases: Mapping[str, Basis]) -> None:
    """Write the mean [W] and the axes [M, W] of each name."""
    import zarr

    group = zarr.create_group(group_dir, zarr_format=3)
    for name, basis in bases.items():
        _write(group, f"{name}.mean", basis.mean, np.nan)
        _write(group, f"{name}.axes", basis.axes, np.nan)


def read_bases(group_dir: Path, spec: HiddenSpec) -> dict[str, Basis]:
    """The basis of each of `spec.component_names`. Raises ShardCorrupt for anything else."""
    assert spec.pca is not None
    width, many = spec.width, spec.pca
    return {
        name: Basis(
            _read(group_dir, f"{name}.mean", (width,), "float32"),
            _read(group_dir, f"{name}.axes", (many, width), "float32"),
        )
        for name in spec.component_names
    }


def fingerprint(bases: Mapping[str, Basis]) -> str:
    """sha256 hex of bases: for each name in order the name, a zero byte, mean and axes (little endian)."""
    digest = hashlib.sha256()
    for name, basis in bases.items():
        digest.update(f"{name}\x00".encode())
        for part in basis:
            digest.update(np.ascontiguousarray(part, "<f4").data)
    return digest.hexdigest()


def _write(group: "zarr.Group", name: str, values: npt.NDArray[Any], missing: float) -> None:
    from zarr.codecs import BytesCodec, Crc32cCodec

    inside, whole = _chunks(values.shape, values.dtype)
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=inside,
        shards=whole,
        serializer=BytesCodec(),
        compressors=Crc32cCodec(),
        fill_value=missing,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[:] = values


def _chunks(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape of an inner chunk, shape of the one shard file), in numbers; zarr takes whole chunks."""
    a_vector = math.prod(shape[1:]) * dtype.itemsize
    inside = max(1, min(CHUNK_BYTES // a_vector, shape[0]))
    return (inside, *shape[1:]), (-(-max(shape[0], 1) // inside) * inside, *shape[1:])


def _layout(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[dict[str, Any], int]:
    """(the zarr.json that `_write` makes for an array, bytes of its shard file)."""
    inside, whole = _chunks(shape, dtype)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": list(inside),
        "codecs": [little if dtype.itemsize > 1 else {"name": "bytes"}, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    described = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(whole)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": MISSING if dtype == np.int8 else "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    num, index_entry, crc = whole[0] // inside[0], 16, 4
    return described, num * (math.prod(inside) * dtype.itemsize + crc + index_entry) + crc


def _read(group_dir: Path, name: str, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """One array. Its zarr.json is compared with the expected one before zarr reads it or allocates memory."""
    import zarr

    where = group_dir / name
    try:
        expected, size = _layout(shape, np.dtype(dtype))
        if (where / "zarr.json").stat().st_size > MAX_METADATA_BYTES:
            raise ValueError("its zarr.json is longer than that of any array")
        found = json.loads((where / "zarr.json").read_bytes())
        more = [key for key, value in found.items() if value and key != "attributes"]
        for key in [*expected, *more]:
            if found.get(key) != expected.get(key):
                raise ValueError(f"{key} is {found.get(key)}, expected {expected.get(key)}")
        file = where / ("c" + ".0" * len(shape))
        if file.stat().st_size != size:
            raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, expected {size:,}")
        array = zarr.open_array(where, mode="r", zarr_format=3)
        return np.asarray(array[:])
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RecursionError) as error:
        raise ShardCorrupt(f"{where} cannot be read as Zarr: {error}") from error
