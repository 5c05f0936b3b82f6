"""Cached shards of language models -> training batches: what the teacher read is what the student reads.

A row is read in pieces of at most `max_length` tokens. A piece ends before its row's last token, which has no
target: so every true token of a batch has a label (the next token) and the teacher's entries. epochs.py has
the order.

Shape letters: N pieces, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.rows import Rows
from pipeline.losses.sparse import SparseTargets
from pipeline.streaming.batch import (
    ALONE,
    BUCKET_BATCHES,
    SHARDS_PER_WINDOW,
    DistillBatch,
    Stream,
    locate_rows,
)
from pipeline.streaming.decoded_shards import SCRATCH, DecodedShards
from pipeline.streaming.epochs import Indices, PlannedWindow, ShardStream
from pipeline.streaming.hidden_states import check_hidden_kept, read_states, shards_in_memory
from pipeline.streaming.model_inputs import input_tensors
from storage import Cache, order
from storage.entries import ends, ranges
from storage.records import EntryRows

WINDOW_TOKENS = 2**21  # about 200 MB of entries at a time
PAD_ID = 0  # no token attends to it: padding is on the right, and a decoder looks back


class _Pieces(NamedTuple):
    """Pieces of some rows of a shard: where each begins among its tokens, and how many it has."""

    starts: Indices  # N
    lengths: Indices  # N, tokens with a target

    @classmethod
    def of(cls, first: Indices, num_tokens: npt.ArrayLike, max_length: int) -> "_Pieces":
        """The pieces of rows that begin at these tokens and have these lengths."""
        tokens = np.asarray(num_tokens, np.int64)
        counts = -(-np.maximum(tokens - 1, 0) // max_length)
        owner = np.repeat(np.arange(len(tokens)), counts)
        inside = ranges(np.zeros(len(tokens), np.int64), counts) * max_length
        return cls(first[owner] + inside, np.minimum(max_length, tokens[owner] - 1 - inside))


class CachedDocuments(ShardStream["_Part"]):
    """The rows of some splits of a dataset, in pieces, with the entries that a cache holds for them.

    `hidden` are names of `Cache.hidden_names` to read too: states of the true tokens of each batch. Raises
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
        spool: DecodedShards | None = None,
    ) -> None:
        check_hidden_kept(cache, hidden)
        self.cache, self.max_length, self.hidden = cache, max_length, hidden
        self._spool = spool or DecodedShards(SCRATCH, stream.decoded_bytes)
        self._by_shard = [place.held for place in locate_rows(cache, rows, splits)]
        lengths, starts = cache.index()[1], ends([shard.rows for shard in cache.shards])
        self._num_tokens = np.split(lengths, starts[1:-1])
        self._pieces = [
            _Pieces.of(np.zeros_like(held), num_tokens[held], max_length).lengths
            for num_tokens, held in zip(self._num_tokens, self._by_shard, strict=True)
        ]
        self.num_rows = sum(len(held) for held in self._by_shard)
        self.num_pieces = sum(len(pieces) for pieces in self._pieces)
        self.num_targets = int(sum(pieces.sum() for pieces in self._pieces))
        largest = max(shard.positions for shard in cache.shards)
        mixed = max(1, min(SHARDS_PER_WINDOW, WINDOW_TOKENS // max(largest, 1)))
        super().__init__(len(self._by_shard), shards_in_memory(mixed, cache, hidden), stream)

    def num_steps(self, seed: int, epochs: int, batch_tokens: int) -> int:
        """Batches of all epochs: exact, from the lengths alone."""
        return sum(len(list(cut)) for e in range(epochs) for _, cut in self.plan(seed, e, batch_tokens))

    def padding(self, seed: int, batch_tokens: int) -> tuple[float, float]:
        """The share of padding among the tokens of an epoch: in this order, and without sorting by length."""
        spent = spent_unsorted = 0
        for shards, cut in self.plan(seed, 0, batch_tokens):
            lengths = self._lengths(shards)
            parts = list(cut)
            spent += sum(len(part) * int(lengths[part].max()) for part in parts)
            unsorted = lengths[order.permutation(len(lengths), seed)]
            same_sizes = np.split(unsorted, np.cumsum([len(part) for part in parts])[:-1])
            spent_unsorted += sum(len(part) * int(part.max()) for part in same_sizes)
        return 1 - self.num_targets / max(spent, 1), 1 - self.num_targets / max(spent_unsorted, 1)

    def entropy(self) -> float:
        """The mean entropy of the teacher over all targets, in nats."""
        total = 0.0
        for shard, held in zip(self.cache.shards, self._by_shard, strict=True):
            if len(held):
                total += float(_entropy(self.cache.read(shard))[held].sum(dtype=np.float64))
        return total / max(self.num_targets, 1)

    def _lengths(self, shards: Sequence[int]) -> Indices:
        return np.concatenate([self._pieces[shard] for shard in shards])

    def _cut(self, lengths: Indices, batch_size: int, *key: int) -> Iterator[Indices]:
        return order.token_batches(lengths, batch_size, BUCKET_BATCHES, *key)

    def _plan_in_order(self, batch_size: int) -> Iterator[PlannedWindow]:
        for shard, lengths in enumerate(self._pieces):
            if len(lengths):
                yield PlannedWindow([shard], self._cut(lengths, batch_size, 0))

    def _read(self, shard: int) -> "_Part":
        """The content of one shard, and the pieces of its rows."""
        if (arrays := self._spool.get((shard, self.hidden))) is None:
            arrays = self._decoded(shard)
            self._spool.put((shard, self.hidden), arrays)
        held, num_tokens = self._by_shard[shard], self._num_tokens[shard]
        pieces = _Pieces.of(ends(num_tokens)[held], num_tokens[held], self.max_length)
        own = {name: arrays[name] for name in ("token_ids", "counts", "ids", "weights", "log_tail")}
        return _Part(**own, hidden={name: arrays[name] for name in self.hidden}, pieces=pieces)

    def _decoded(self, shard: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a _Part."""
        rows = self.cache.read(self.cache.shards[shard])
        assert isinstance(rows, EntryRows)  # the spec says that there is a target a token
        every, entries = np.arange(len(rows.num_tokens)), rows.entries
        states = read_states(self.cache, shard, self.hidden, every, rows.num_tokens)
        return {
            "token_ids": _tokens(rows), "counts": entries.counts.astype(np.int32), "ids": entries.ids,
            "weights": entries.weights, "log_tail": entries.log_tail,
            **{name: kept.values for name, kept in states.items()},
        }  # fmt: skip

    def _window(self, shards: Sequence[int], parts: Iterable["_Part"]) -> "_Window":
        return _Window(list(parts))


class _Part(NamedTuple):
    """One shard in memory: its tokens with the entries of each, and the pieces of its rows."""

    token_ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]  # entries of each token
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    log_tail: npt.NDArray[np.float32]
    hidden: dict[str, npt.NDArray[np.float32]]
    pieces: _Pieces


class _Window:
    """Some shards in memory, as they were read: a batch copies the tokens of its pieces, piece by piece."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self._lengths = np.concatenate([part.pieces.lengths for part in parts])
        places = []  # of each piece: its part, its first token and the one after its last; so of entries
        for owner, part in enumerate(parts):
            offsets, (starts, lengths) = ends(part.counts), part.pieces
            tokens = np.stack([starts, starts + lengths], axis=1)
            owners = np.full((len(tokens), 1), owner)
            places.append(np.concatenate([owners, tokens, offsets[tokens]], axis=1))
        self._places = np.concatenate(places)

    def num_targets(self, items: Indices) -> int:
        """Targets of these pieces."""
        return int(self._lengths[items].sum())

    def num_labelled(self, items: Indices) -> int:
        """All of them: the label of a token is the next one."""
        return self.num_targets(items)

    def batch(self, items: Indices) -> DistillBatch:
        """These pieces, padded on the right."""
        lengths = self._lengths[items]
        mask_BL = np.arange(lengths.max()) < lengths[:, None]
        ids_BL = np.full(mask_BL.shape, PAD_ID, np.int64)
        pieces = [(self._parts[owner], *place) for owner, *place in self._places[items].tolist()]
        ids_BL[mask_BL] = np.concatenate([own.token_ids[start:stop] for own, start, stop, _, _ in pieces])
        labels = [own.token_ids[start + 1 : stop + 1] for own, start, stop, _, _ in pieces]
        counts_T = np.concatenate([own.counts[start:stop] for own, start, stop, _, _ in pieces])
        entries = SparseTargets(
            torch.from_numpy(np.repeat(np.arange(len(counts_T)), counts_T)),
            _joined([own.ids[first:last] for own, _, _, first, last in pieces], np.int64),
            _joined([own.weights[first:last] for own, _, _, first, last in pieces], np.float32),
            _joined([own.log_tail[start:stop] for own, start, stop, _, _ in pieces], np.float32),
        )
        hidden = {
            name: _joined([own.hidden[name][start:stop] for own, start, stop, _, _ in pieces], np.float32)
            for name in self._parts[0].hidden
        }
        inputs = input_tensors({"input_ids": ids_BL, "attention_mask": mask_BL})
        return DistillBatch(inputs, _joined(labels, np.int64), entries, hidden)


def _joined(parts: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts, dtype=dtype))


def _tokens(rows: EntryRows) -> npt.NDArray[np.int32]:
    assert rows.token_ids is not None
    return rows.token_ids


def _entropy(rows: object) -> npt.NDArray[np.float32]:
    assert isinstance(rows, EntryRows)
    assert rows.entropy is not None
    return rows.entropy
