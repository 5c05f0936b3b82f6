"""Hidden states of cached rows, read for batches.

A name is one of storage.Cache.hidden_names. Shape letters: N rows, W width.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage import Cache
from storage.entries import ends, ranges
from storage.errors import Mismatch, SpecMismatch

WINDOW_BYTES = 2**29  # of states in memory at a time; at least one shard


class States(NamedTuple):
    """Hidden states of N rows, selected in the same way as entries."""

    values: npt.NDArray[np.float32]  # N x W, or one for each token, row after row
    num_tokens: npt.NDArray[np.int64] | None  # N, where there is one a token

    def take(self, rows: npt.NDArray[np.int64]) -> "States":
        """The states of these rows, in this order."""
        if self.num_tokens is None:
            return States(self.values[rows], None)
        counts = self.num_tokens[rows]
        return States(self.values[ranges(ends(self.num_tokens)[rows], counts)], counts)


def check_hidden_kept(cache: Cache, names: tuple[str, ...]) -> None:
    """Raise SpecMismatch where the cache lacks hidden states of these names."""
    if missing := [name for name in names if name not in cache.hidden_names]:
        raise SpecMismatch(
            f"{cache.path} does not have the hidden states that the recipe needs",
            [Mismatch("spec.hidden", list(cache.hidden_names), missing)],
            f"Write hidden: {{layers: [...]}} under caches.{cache.path.name} in params.yaml (qkv: [...] with "
            f"pool: none for queries, keys and values) and run `dvc repro cache@{cache.path.name}`.",
        )


def read_states(
    cache: Cache, shard: int, names: tuple[str, ...], rows: npt.NDArray[np.int64], lengths: npt.ArrayLike
) -> dict[str, States]:
    """The hidden states of these rows of a shard; `lengths` [rows of the shard] are its numbers of tokens."""
    counts = np.asarray(lengths, np.int64) if cache.hidden_per_position else None
    return {name: States(cache.hidden(cache.shards[shard], name), counts).take(rows) for name in names}


def shards_in_memory(num_shards: int, cache: Cache, names: tuple[str, ...]) -> int:
    """`num_shards`, or fewer where their hidden states are larger than WINDOW_BYTES."""
    spec = cache.identity.spec.hidden
    if spec is None or not names:
        return num_shards
    vectors = max(shard.positions if cache.hidden_per_position else shard.rows for shard in cache.shards)
    largest = 4 * vectors * sum(spec.kept_width(name) for name in names)
    return max(1, min(num_shards, WINDOW_BYTES // max(largest, 1)))


def concatenate_states(parts: list[dict[str, States]]) -> dict[str, States]:
    """The states of all parts, one after the other, by name."""
    found = {}
    for name in parts[0] if parts else ():
        counts = [part[name].num_tokens for part in parts]
        per_token = [count for count in counts if count is not None]
        values = np.concatenate([part[name].values for part in parts])
        found[name] = States(values, np.concatenate(per_token) if per_token else None)
    return found
