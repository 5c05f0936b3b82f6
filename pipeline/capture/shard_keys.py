"""The shards that a capture cuts its rows into, and their keys, computed before the store is consulted.

A shard's key follows from its rows, so its key alone tells whether it is finished: nothing is listed, and
finished shards are not opened. docs/scale.md has the cost for a million shards.

Letters: N rows, S shards.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from storage.fingerprints import ROW_ID_CHARS
from storage.spec import Identity
from storage.writer import StoredShard

CHUNK_ROWS = 2**16  # rows whose ids and hashes are concatenated at a time
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, with well spread bits: mixes two words into one

Indices = npt.NDArray[np.int64]
KeyBytes = npt.NDArray[np.uint8]  # S x 32


class ShardCut(NamedTuple):
    """Distinct rows in dataset order, cut into shards of `shard_rows`; the last one may be shorter."""

    rows: Indices  # N, the first place of each distinct row
    keys: KeyBytes  # S x 32, as storage.spec.shard_key, in bytes
    shard_rows: int

    def part(self, shard: int) -> Indices:
        """The rows of one shard."""
        return self.rows[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def names(self) -> list[str]:
        """The keys as text, 64 hex characters each."""
        return key_names(self.keys)


def cut_into_shards(
    identity: Identity, row_ids: pa.StringArray, input_hashes: pa.StringArray, shard_rows: int
) -> ShardCut:
    """The shards of these rows, with the keys of storage.spec.shard_key."""
    rows, ids, inputs = first_occurrences(row_ids), _characters(row_ids), _characters(input_hashes)
    start, digests = hashlib.sha256(identity.fingerprint.encode()), bytearray()
    a_chunk, a_shard = max(1, CHUNK_ROWS // shard_rows) * shard_rows, 2 * ROW_ID_CHARS * shard_rows
    for first in range(0, len(rows), a_chunk):
        own = slice(first, first + a_chunk)
        part = own if len(rows) == len(ids) else rows[own]
        names = np.concatenate([ids[part], inputs[part]], axis=1).reshape(-1).data
        for begin in range(0, len(names), a_shard):
            digest = start.copy()
            digest.update(names[begin : begin + a_shard])
            digests += digest.digest()
    return ShardCut(rows, np.frombuffer(digests, np.uint8).reshape(-1, 32), shard_rows)


def first_occurrences(row_ids: pa.StringArray) -> Indices:
    """The first place of each distinct row, in order."""
    words = _characters(row_ids).view(np.uint64)
    mixed = words[:, 0].copy()
    for column in words.T[1:]:
        mixed = (mixed * MIX) ^ column
    mixed.sort()
    if (mixed[1:] != mixed[:-1]).all():  # equal rows have equal numbers
        return np.arange(len(row_ids))
    codes = pc.dictionary_encode(row_ids).indices.to_numpy()
    return np.unique(codes, return_index=True)[1]


def unfinished_shards(cut: ShardCut, finished: KeyBytes) -> Indices | None:
    """The shards of the cut that are not among the keys `finished`.

    None where one of these keys is not in the cut: its rows must be read (plan_reuse).
    """
    at = key_places(finished, cut.keys)
    left = np.ones(len(cut.keys), bool)
    left[at] = False
    return None if (at < 0).any() else np.flatnonzero(left)


def key_places(keys: KeyBytes, among: KeyBytes) -> Indices:
    """The place of each key in `among`, whose keys are distinct; -1 for keys that are not there."""
    if not len(among):
        return np.full(len(keys), -1)
    words, known = keys.view(np.uint64), among.view(np.uint64)
    order, sorted_keys = (
        np.argsort(known[:, 0]),
        np.argsort(words[:, 0]),
    )  # searched in order: fewer cache misses
    first = known[:, 0][order]
    if (first[1:] == first[:-1]).any():  # the first 64 bits of two keys are equal
        place = {bytes(key): index for index, key in enumerate(among)}
        return np.array([place.get(bytes(key), -1) for key in keys], np.int64)
    at = np.empty(len(keys), np.int64)
    at[sorted_keys] = order[np.minimum(np.searchsorted(first, words[:, 0][sorted_keys]), len(first) - 1)]
    same = np.ones(len(keys), bool)
    for own, other in zip(words.T, known.T, strict=True):
        same &= own == other[at]
    return np.where(same, at, -1)


def key_bytes(names: Iterable[str]) -> KeyBytes:
    """Keys as bytes [S, 32], from 64 hex characters each."""
    return np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, 32)


def key_names(keys: KeyBytes) -> list[str]:
    """Keys as text."""
    text = keys.tobytes().hex()
    return [text[start : start + 64] for start in range(0, len(text), 64)]


def _characters(names: pa.StringArray) -> npt.NDArray[np.uint8]:
    """The characters of names of ROW_ID_CHARS characters each [N, 32], without a copy."""
    if not len(names):
        return np.zeros((0, ROW_ID_CHARS), np.uint8)
    _, offsets, characters = names.buffers()
    first = int(np.frombuffer(offsets, np.int32)[names.offset])
    flat = np.frombuffer(characters, np.uint8)[first : first + len(names) * ROW_ID_CHARS]
    return flat.reshape(-1, ROW_ID_CHARS)


def plan_reuse(
    row_ids: Sequence[str], finished: Sequence[StoredShard], shard_rows: int
) -> tuple[list[StoredShard], list[Indices]]:
    """(shards to reuse, rows of each new shard), so that every distinct row is in exactly one shard.

    `finished` is largest first; a shard is reused where all its rows are wanted and none is in another
    reused shard. The result depends on the arguments alone, and finishing one of the new shards does not
    change the others.
    """
    first: dict[str, int] = {}
    for index, row in enumerate(row_ids):
        first.setdefault(row, index)
    left = set(first)
    taken = []
    for shard in finished:
        held = shard.row_ids().to_pylist()
        if left.issuperset(held):
            left.difference_update(held)
            taken.append(shard)
    rest = np.array([index for row, index in first.items() if row in left], np.int64)
    return taken, [rest[start : start + shard_rows] for start in range(0, len(rest), shard_rows)]
