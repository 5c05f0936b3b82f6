"""Cached shards of language models -> training batches: what the teacher read is what the student reads.

A row is read in pieces of at most so many tokens. A piece ends before its row's last token, which has no
target: so every true token of a batch has a label (the next token) and the teacher's entries. The order
depends on (seed, epoch, position) alone, as in batches.py.

Shape letters: N pieces, T tokens.
"""

import itertools
from collections.abc import Generator, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.batches import (
    ALONE,
    BUCKET_BATCHES,
    SHARDS_PER_WINDOW,
    DistillBatch,
    Stream,
    Whole,
    ahead,
    places,
)
from pipeline.cached_states import States, laid_end_to_end, narrowed, read_states, refuse_unkept
from pipeline.data import Rows
from pipeline.losses import SparseTargets
from pipeline.prefetch import decoded
from storage import Cache, order
from storage.entries import Entries, concatenate, ends, ranges
from storage.records import EntryRows

WINDOW_TOKENS = 2**21  # about 200 MB of entries at a time
PAD_ID = 0  # read by no token: padding stands behind, and a decoder looks back

Indices = npt.NDArray[np.int64]


class _Pieces(NamedTuple):
    """Pieces of some rows: where each begins among the tokens of all, and how many it has."""

    starts: Indices  # N
    lengths: Indices  # N, tokens with a target

    @classmethod
    def of(cls, num_tokens: npt.ArrayLike, max_length: int) -> "_Pieces":
        """The pieces of rows of so many tokens each, laid end to end."""
        tokens = np.asarray(num_tokens, np.int64)
        counts = -(-np.maximum(tokens - 1, 0) // max_length)
        owner = np.repeat(np.arange(len(tokens)), counts)
        inside = ranges(np.zeros(len(tokens), np.int64), counts) * max_length
        return cls(ends(tokens)[owner] + inside, np.minimum(max_length, tokens[owner] - 1 - inside))


class CachedDocuments:
    """The rows of some splits of a dataset, in pieces, with the entries that a cache holds for them.

    `hidden` are names of `Cache.hidden_names` to read along: states of the true tokens of each batch. Raises
    SpecMismatch where the cache lacks a row or a name.
    """

    def __init__(
        self,
        cache: Cache,
        rows: Rows,
        splits: tuple[str, ...],
        max_length: int,
        hidden: tuple[str, ...] = (),
        stream: Stream = ALONE,
    ) -> None:
        refuse_unkept(cache, hidden)
        self.cache, self.max_length, self.hidden = cache, max_length, hidden
        self._stream = stream
        self._by_shard = [place.held for place in places(cache, rows, splits)]
        lengths, starts = cache.index()[1], ends([shard.rows for shard in cache.shards])
        self._pieces = [
            _Pieces.of(lengths[first + held], max_length).lengths
            for first, held in zip(starts[:-1], self._by_shard, strict=True)
        ]
        self.num_rows = sum(len(held) for held in self._by_shard)
        self.num_pieces = sum(len(pieces) for pieces in self._pieces)
        self.num_targets = int(sum(pieces.sum() for pieces in self._pieces))
        largest = max(shard.positions for shard in cache.shards)
        mixed = max(1, min(SHARDS_PER_WINDOW, WINDOW_TOKENS // max(largest, 1)))
        self._shards_per_window = narrowed(mixed, cache, hidden)

    def num_steps(self, seed: int, epochs: int, batch_tokens: int) -> int:
        """Batches of so many epochs: exact, from the lengths alone."""
        return sum(len(list(cut)) for e in range(epochs) for _, cut in self._order(seed, e, batch_tokens))

    def padding(self, seed: int, batch_tokens: int) -> tuple[float, float]:
        """The share of padding among the tokens of an epoch: as it is, and where lengths were not sorted."""
        spent = spent_unsorted = 0
        for shards, cut in self._order(seed, 0, batch_tokens):
            lengths = np.concatenate([self._pieces[shard] for shard in shards])
            parts = list(cut)
            spent += sum(len(part) * int(lengths[part].max()) for part in parts)
            unsorted = lengths[order.permutation(len(lengths), seed)]
            same_sizes = np.split(unsorted, np.cumsum([len(part) for part in parts])[:-1])
            spent_unsorted += sum(len(part) * int(part.max()) for part in same_sizes)
        return 1 - self.num_targets / max(spent, 1), 1 - self.num_targets / max(spent_unsorted, 1)

    def epoch(
        self, seed: int, epoch: int, batch_tokens: int, start: int = 0
    ) -> Generator[DistillBatch, None, None]:
        """The batches of one training epoch from the `start`th on, read ahead.

        The order depends on (seed, epoch) alone; shards whose batches all lie before `start` are not read.
        """
        return ahead(self._epoch(seed, epoch, batch_tokens, start), self._stream.readers)

    def in_order(self, batch_tokens: int) -> Iterator[DistillBatch]:
        """All pieces once, a shard at a time, those of like length together: for evaluation."""
        for shard, lengths in enumerate(self._pieces):
            if len(lengths):
                window = _Window([self._read(shard)], self.max_length)
                for part in order.token_batches(lengths, batch_tokens, BUCKET_BATCHES, 0):
                    yield window.batch(part)

    def entropy(self) -> float:
        """The teacher's mean entropy over all targets, in nats."""
        total = 0.0
        for shard, held in zip(self.cache.shards, self._by_shard, strict=True):
            if len(held):
                total += float(_entropy(self.cache.read(shard))[held].sum(dtype=np.float64))
        return total / max(self.num_targets, 1)

    def _order(
        self, seed: int, epoch: int, batch_tokens: int
    ) -> Iterator[tuple[list[int], Iterator[Indices]]]:
        """(shards, batches of their pieces) of each window of an epoch."""
        for number, shards in enumerate(
            order.windows(len(self._by_shard), self._shards_per_window, seed, epoch)
        ):
            chosen = sorted(int(shard) for shard in shards)
            lengths = np.concatenate([self._pieces[shard] for shard in chosen])
            if len(lengths):
                yield chosen, order.token_batches(lengths, batch_tokens, BUCKET_BATCHES, seed, epoch, number)

    def _epoch(self, seed: int, epoch: int, batch_tokens: int, start: int) -> Iterator[DistillBatch]:
        windows: list[tuple[list[int], Iterator[Indices]]] = []
        for shards, cut in self._order(seed, epoch, batch_tokens):
            if start:  # lengths alone say what lies before it
                parts = list(cut)
                behind, start = min(start, len(parts)), max(0, start - len(parts))
                if behind == len(parts):
                    continue
                cut = iter(parts[behind:])
            windows.append((shards, cut))
        reading = [partial(self._read, shard) for shards, _ in windows for shard in shards]
        with decoded(reading, self._stream.readers) as held:
            for shards, cut in windows:
                window = _Window(list(itertools.islice(held, len(shards))), self.max_length)
                for part in cut:
                    yield self._own(part, window)

    def _read(self, shard: int) -> "_Part":
        """What the cache holds of the rows of one shard that are asked for."""
        held = self.cache.read(self.cache.shards[shard])
        assert isinstance(held, EntryRows)  # the spec says that there is a target a token
        rows = self._by_shard[shard]
        return _Part(held.take(rows), read_states(self.cache, shard, self.hidden, rows, held.num_tokens))

    def _own(self, part: Indices, window: "_Window") -> DistillBatch:
        """This rank's part of a global batch."""
        ranks = self._stream.ranks
        if ranks == 1:
            return window.batch(part)
        own, targets = order.part(part, self._stream.rank, ranks), window.num_targets(part)
        whole = Whole(ranks, len(part), targets, targets, not len(own))
        return window.batch(own if len(own) else part[:1])._replace(whole=whole)


class _Part(NamedTuple):
    """Rows of one shard."""

    rows: EntryRows
    hidden: dict[str, States]


class _Window:
    """Rows of some shards in memory."""

    def __init__(self, parts: list[_Part], max_length: int) -> None:
        tokens = [part.rows.token_ids for part in parts if part.rows.token_ids is not None]
        entries = [part.rows.entries for part in parts]
        lengths = [part.rows.num_tokens for part in parts]
        states = [part.hidden for part in parts]
        self._tokens = np.concatenate(tokens).astype(np.int64)
        self._entries: Entries = concatenate(entries)
        self._hidden = {name: kept.values for name, kept in laid_end_to_end(states).items()}
        self._pieces = _Pieces.of(np.concatenate(lengths), max_length)

    def num_targets(self, part: Indices) -> int:
        """Those of these pieces."""
        return int(self._pieces.lengths[part].sum())

    def batch(self, part: Indices) -> DistillBatch:
        """These pieces, padded on the right."""
        starts, lengths = self._pieces.starts[part], self._pieces.lengths[part]
        mask_BL = np.arange(lengths.max()) < lengths[:, None]
        ids_BL = np.full(mask_BL.shape, PAD_ID, np.int64)
        places_T = ranges(starts, lengths)
        ids_BL[mask_BL] = self._tokens[places_T]
        targets = SparseTargets.of(self._entries.take(places_T))
        labels_T = torch.from_numpy(self._tokens[places_T + 1])
        hidden = {name: torch.from_numpy(states[places_T]) for name, states in self._hidden.items()}
        return DistillBatch(torch.from_numpy(ids_BL), torch.from_numpy(mask_BL), labels_T, targets, hidden)


def _entropy(rows: object) -> npt.NDArray[np.float32]:
    assert isinstance(rows, EntryRows)
    assert rows.entropy is not None
    return rows.entropy
