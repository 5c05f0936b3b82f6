"""Verifies a whole cache: every byte is the sealed one, and rows, token ids and numbers are consistent."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from storage.checksums import AGAIN, check_no_stray
from storage.errors import ShardCorrupt
from storage.fingerprints import content_fingerprint, input_hash
from storage.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from storage.reader import Cache
    from storage.records import EntryRows, LogitRows


class Counts(NamedTuple):
    """What `verify` counted in a sound cache."""

    rows: int
    positions: int  # token ids that the teacher read
    shards: int
    files: int
    bytes: int


def verify(cache: "Cache", on_shard: Callable[[int], None] = lambda rows: None) -> Counts:
    """Read all of `cache` and check it: digests, no stray file, rows unique and covered, every number finite,
    token ids those of the row's hash.

    `on_shard` is called with the number of rows after each shard, for progress. Raises a CacheError that
    names the first fault.
    """
    if isinstance(cache.path, Path):  # remote directories are not listed
        check_no_stray(cache.path, {file.path for file in cache.manifest.files} | {MANIFEST_NAME})
    with cache.files.holding(cache.manifest.tokenizer_files):
        pass
    if cache.manifest.weights is not None:
        with cache.files.holding(cache.manifest.weights.files):
            pass
    if cache.identity.spec.hidden is not None:
        for name in cache.identity.spec.hidden.component_names:
            cache.hidden_basis(name)
    seen: set[str] = set()
    positions = 0
    for shard in cache.shards:
        rows = cache.read(shard)
        row_ids = rows.row_ids.to_pylist()
        twice = [row for row in row_ids if row in seen]
        if twice or len(set(row_ids)) != len(row_ids):
            raise ShardCorrupt(f"{cache.path}: row {(twice or row_ids)[0]} is in the cache twice.\n{AGAIN}")
        seen.update(row_ids)
        positions += int(rows.num_tokens.sum())
        if rows.token_ids is not None:
            _check_tokens(cache, rows)
        owners = np.arange(len(row_ids))
        if cache.hidden_per_position:
            owners = np.repeat(owners, rows.num_tokens)
        for name in cache.hidden_names:
            finite = np.isfinite(cache.hidden(shard, name)).all(axis=1)
            if not finite.all():
                bad = row_ids[int(owners[~finite][0])]
                raise ShardCorrupt(f"{cache.path}: the hidden state of row {bad} ({name}) is not finite.")
        on_shard(len(row_ids))
    if content_fingerprint(seen) != cache.manifest.dataset:
        raise ShardCorrupt(f"{cache.path}: its rows are not those of its manifest's dataset.\n{AGAIN}")
    files = cache.manifest.files
    return Counts(len(seen), positions, len(cache.shards), len(files), sum(file.bytes for file in files))


def _check_tokens(cache: "Cache", rows: "LogitRows | EntryRows") -> None:
    assert rows.token_ids is not None
    parts = np.split(rows.token_ids, np.cumsum(rows.num_tokens)[:-1])
    for row, expected, read in zip(rows.row_ids, rows.input_hashes, parts, strict=True):
        if (found := input_hash(read)) != expected.as_py():
            raise ShardCorrupt(
                f"{cache.path}: row {row} has other token ids than those of its input hash.\n"
                f"  found    {found}\n  expected {expected}\n{AGAIN}"
            )
