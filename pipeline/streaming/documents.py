"""Cached shards of language models -> training batches: what the teacher read is what the student reads.

A row is read in pieces of at most so many tokens. A piece ends before its row's last token, which has no
target: so every true token of a batch has a label (the next token) and the teacher's entries. The order
depends on (seed, epoch, position) alone, as in batches.py.

Shape letters: N pieces, T tokens.
"""

import itertools
from collections.abc import Generator, Iterator
from functools import partial
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
    GlobalBatch,
    Stream,
    locate_rows,
    read_ahead,
)
from pipeline.streaming.decoded_shards import SCRATCH, DecodedShards
from pipeline.streaming.hidden_states import check_hidden_kept, read_states, shards_in_memory
from pipeline.streaming.model_inputs import input_tensors
from pipeline.streaming.prefetch import decode_ahead
from storage import Cache, order
from storage.entries import ends, ranges
from storage.records import EntryRows

WINDOW_TOKENS = 2**21  # about 200 MB of entries at a time
PAD_ID = 0  # read by no token: padding stands behind, and a decoder looks back

Indices = npt.NDArray[np.int64]


class _Pieces(NamedTuple):
    """Pieces of some rows of a shard: where each begins among its tokens, and how many it has."""

    starts: Indices  # N
    lengths: Indices  # N, tokens with a target

    @classmethod
    def of(cls, first: Indices, num_tokens: npt.ArrayLike, max_length: int) -> "_Pieces":
        """The pieces of rows that begin at these tokens and have so many."""
        tokens = np.asarray(num_tokens, np.int64)
        counts = -(-np.maximum(tokens - 1, 0) // max_length)
        owner = np.repeat(np.arange(len(tokens)), counts)
        inside = ranges(np.zeros(len(tokens), np.int64), counts) * max_length
        return cls(first[owner] + inside, np.minimum(max_length, tokens[owner] - 1 - inside))


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
        spool: DecodedShards | None = None,
    ) -> None:
        check_hidden_kept(cache, hidden)
        self.cache, self.max_length, self.hidden = cache, max_length, hidden
        self._stream, self._spool = stream, spool or DecodedShards(SCRATCH, stream.decoded_bytes)
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
        self._shards_per_window = shards_in_memory(mixed, cache, hidden)

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
        return read_ahead(self._epoch(seed, epoch, batch_tokens, start), self._stream.readers)

    def in_order(self, batch_tokens: int) -> Iterator[DistillBatch]:
        """All pieces once, a shard at a time, those of like length together: for evaluation."""
        for shard, lengths in enumerate(self._pieces):
            if len(lengths):
                window = _Window([self._read(shard)])
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
        with decode_ahead(reading, self._stream.readers) as held:
            for shards, cut in windows:
                window = _Window(list(itertools.islice(held, len(shards))))
                for part in cut:
                    yield self._own(part, window)
                del window  # before the next one is read

    def _read(self, shard: int) -> "_Part":
        """What the cache holds of one shard, and the pieces of its rows that are asked for."""
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

    def _own(self, part: Indices, window: "_Window") -> DistillBatch:
        """This rank's part of a global batch."""
        ranks = self._stream.ranks
        if ranks == 1:
            return window.batch(part)
        own, targets = order.part(part, self._stream.rank, ranks), window.num_targets(part)
        whole = GlobalBatch(ranks, len(part), targets, targets, not len(own))
        return window.batch(own if len(own) else part[:1])._replace(whole=whole)


class _Part(NamedTuple):
    """One shard in memory: its tokens with the entries of each, and the pieces that are asked for."""

    token_ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]  # entries of each token
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    log_tail: npt.NDArray[np.float32]
    hidden: dict[str, npt.NDArray[np.float32]]
    pieces: _Pieces


class _Window:
    """Some shards in memory, as they were read: a batch copies the tokens of its pieces, run by run."""

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

    def num_targets(self, part: Indices) -> int:
        """Those of these pieces."""
        return int(self._lengths[part].sum())

    def batch(self, part: Indices) -> DistillBatch:
        """These pieces, padded on the right."""
        lengths = self._lengths[part]
        mask_BL = np.arange(lengths.max()) < lengths[:, None]
        ids_BL = np.full(mask_BL.shape, PAD_ID, np.int64)
        pieces = [(self._parts[owner], *place) for owner, *place in self._places[part].tolist()]
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
