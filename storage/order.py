"""The order of training rows, as a function of (seed, epoch) and the shards alone.

Shards are permuted, taken in windows of a few, and the rows of a window are permuted together: whole
shards are read, and no worker, rank or earlier batch can change the order. Only numpy's guaranteed bit stream
is used (`PCG64(SeedSequence).random_raw`); `Generator.permutation` may change between numpy versions.

ORDER_VERSION goes up whenever the same arguments would give another order.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

ORDER_VERSION = 1

Indices = npt.NDArray[np.int64]


def permutation(num: int, *key: int) -> Indices:
    """A permutation of range(num) that depends on `key` alone, the same on every machine."""
    bits = np.random.PCG64(np.random.SeedSequence([ORDER_VERSION, *key])).random_raw(num)
    return np.argsort(bits, kind="stable")


def windows(num_shards: int, per_window: int, *key: int) -> list[Indices]:
    """The shards of one epoch in permuted order, cut into windows of `per_window`."""
    order = permutation(num_shards, 0, *key)
    return [order[start : start + per_window] for start in range(0, num_shards, per_window)]


def part(batch: Indices, rank: int, ranks: int) -> Indices:
    """The contiguous part of a global batch that process `rank` of `ranks` takes, all about equally large.

    The concatenated parts of all ranks are the batch. Where it has fewer rows than there are ranks, some
    parts are empty: no row is repeated.
    """
    return batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]


def batches(
    lengths: Sequence[int] | Indices, batch_rows: int, bucket_batches: int, *key: int
) -> Iterator[Indices]:
    """Batches of row indices of one window: rows permuted, sorted by length in buckets, batches permuted.

    `lengths` are tokens a row. Buckets of `bucket_batches` batches keep padding small and the order random:
    rows of one batch have similar lengths, but which rows share a batch changes with the key. The last batch
    may be short; no row is repeated or lost.
    """
    lengths_N = np.asarray(lengths, np.int64)
    rows = permutation(len(lengths_N), 1, *key)
    bucket = batch_rows * bucket_batches
    cut: list[Indices] = []
    for start in range(0, len(rows), bucket):
        part = rows[start : start + bucket]
        part = part[np.argsort(lengths_N[part], kind="stable")]
        cut += [part[first : first + batch_rows] for first in range(0, len(part), batch_rows)]
    for index in permutation(len(cut), 2, *key):
        yield cut[index]


def token_batches(
    lengths: Sequence[int] | Indices, batch_tokens: int, bucket_batches: int, *key: int
) -> Iterator[Indices]:
    """As `batches`, but cut so that rows times the longest of them stays within `batch_tokens`.

    A row that is longer is a batch of its own.
    """
    lengths_N = np.asarray(lengths, np.int64)
    rows = permutation(len(lengths_N), 1, *key)
    bucket_of_row = np.cumsum(lengths_N[rows]) // (batch_tokens * bucket_batches)
    cut: list[Indices] = []
    for part in np.split(rows, np.flatnonzero(np.diff(bucket_of_row)) + 1):
        part = part[np.argsort(lengths_N[part], kind="stable")]
        start = 0
        for end in range(1, len(part) + 1):
            if end == len(part) or (end + 1 - start) * lengths_N[part[end]] > batch_tokens:
                cut.append(part[start:end])
                start = end
    for index in permutation(len(cut), 2, *key):
        yield cut[index]
