"""Cached shards -> training batches, in an order that is a function of (seed, epoch, position) alone.

Labels and splits come from the prepared dataset, targets from the cache, joined by row_id. One window of
shards is in memory at a time; threads read and decode it, a bounded number of bytes ahead, so a step does
not wait. How many threads, and how many processes share a batch, changes no batch: see Stream. This file has
rows with one target each; documents.py has those with a target a token.

Shape letters: B batch, L tokens, C classes, T targets: of B rows, or of their true tokens, row after row.
"""

import itertools
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from pipeline.data.inputs import Inputs
from pipeline.data.rows import Rows
from pipeline.losses.divergences import MixedTargets
from pipeline.losses.sparse import SparseTargets
from pipeline.streaming.batch import (
    ALONE,
    BUCKET_BATCHES,
    SHARDS_PER_WINDOW,
    DistillBatch,
    GlobalBatch,
    Stream,
    has_label,
    locate_rows,
    read_ahead,
)
from pipeline.streaming.hidden_states import (
    States,
    check_hidden_kept,
    concatenate_states,
    read_states,
    shards_in_memory,
)
from pipeline.streaming.model_inputs import input_tensors
from pipeline.streaming.prefetch import decode_ahead
from storage import Cache, order
from storage.entries import Entries, concatenate, ends
from storage.errors import Mismatch, SpecMismatch
from storage.mixture import Mixture
from storage.records import LogitRows


class CachedRows:
    """The rows of some splits of a dataset with the targets that a cache holds for them.

    `tokens` are those of all the dataset's rows; `hidden` are names of `Cache.hidden_names` to read along.
    Raises SpecMismatch where the cache lacks a row or a name, and where it has a state a token and the
    student reads other tokens than the teacher did.
    """

    def __init__(
        self,
        cache: Cache,
        rows: Rows,
        tokens: Inputs,
        pad_id: int,
        splits: tuple[str, ...],
        hidden: tuple[str, ...] = (),
        stream: Stream = ALONE,
    ) -> None:
        check_hidden_kept(cache, hidden)
        self.cache, self.rows, self.tokens, self.pad_id, self.hidden = cache, rows, tokens, pad_id, hidden
        self._stream = stream
        self._truth = rows.truth
        self._by_shard = locate_rows(cache, rows, splits)
        # Of a mixture, the first cache is read shard by shard; the logits of the others are in memory.
        self._others_MNC = cache.others(rows.row_ids) if isinstance(cache, Mixture) else None
        self.num_rows = sum(len(place.rows) for place in self._by_shard)
        self._shards_per_window = shards_in_memory(SHARDS_PER_WINDOW, cache, hidden)
        if hidden and cache.hidden_per_position:
            self._refuse_other_tokens()

    def num_batches(self, batch_rows: int) -> int:
        """At most so many batches an epoch; windows may end in short ones."""
        sizes = [len(rows) for rows, _ in self._by_shard]
        windows = -(-len(sizes) // self._shards_per_window)
        return -(-self.num_rows // batch_rows) + windows - 1

    def epoch(
        self, seed: int, epoch: int, batch_rows: int, start: int = 0
    ) -> Generator[DistillBatch, None, None]:
        """The batches of one training epoch from the `start`th on, read ahead.

        The order depends on (seed, epoch) alone; shards whose batches all lie before `start` are not read.
        """
        return read_ahead(self._epoch(seed, epoch, batch_rows, start), self._stream.readers)

    def in_order(self, batch_rows: int) -> Iterator[DistillBatch]:
        """All rows once, a window of shards at a time, those of like length together: for evaluation."""
        for first in range(0, len(self._by_shard), self._shards_per_window):
            shards = range(first, min(first + self._shards_per_window, len(self._by_shard)))
            rows, held = self._window(shards, map(self._read, shards))
            by_length = np.argsort(self.tokens.lengths[rows], kind="stable")
            for start in range(0, len(rows), batch_rows):
                part = by_length[start : start + batch_rows]
                yield self._batch(rows[part], held.take(part))

    def _epoch(self, seed: int, epoch: int, batch_rows: int, start: int) -> Iterator[DistillBatch]:
        windows: list[tuple[int, list[int]]] = []
        for number, shards in enumerate(
            order.windows(len(self._by_shard), self._shards_per_window, seed, epoch)
        ):
            chosen = sorted(int(shard) for shard in shards)
            num = -(-sum(len(self._by_shard[shard].rows) for shard in chosen) // batch_rows)
            if windows or start < num:
                windows.append((number, chosen))
            else:
                start -= num
        reading = [partial(self._read, shard) for _, chosen in windows for shard in chosen]
        with decode_ahead(reading, self._stream.readers) as parts:
            for number, chosen in windows:
                rows, held = self._window(chosen, parts)
                lengths = self.tokens.lengths[rows]
                cut = order.batches(lengths, batch_rows, BUCKET_BATCHES, seed, epoch, number)
                for part in itertools.islice(cut, start, None):
                    yield self._own(rows[part], part, held)
                start = 0

    def _refuse_other_tokens(self) -> None:
        """A state belongs to a token: the student must have the teacher's tokens of every row."""
        lengths, hashes = self.cache.index()[1], self.cache.input_hashes()
        first = ends([shard.rows for shard in self.cache.shards])
        rows = np.concatenate([place.rows for place in self._by_shard])
        held = np.concatenate([start + p.held for start, p in zip(first[:-1], self._by_shard, strict=True)])
        same = pc.equal(self.tokens.hashes(rows), hashes.take(held)).to_numpy(zero_copy_only=False)
        if not same.all():
            raise SpecMismatch(
                f"{self.cache.path} has a hidden state for each token that the teacher read, and the student "
                "reads others",
                [Mismatch("rows read as the teacher did", int(same.sum()), len(same))],
                "Write tokenizer: teacher under students.NAME in params.yaml, with a max_length of at least "
                f"{int(lengths[held].max())} tokens, the longest row.",
            )

    def _read(self, shard: int) -> "_Held | None":
        """What the cache holds of the rows of one shard; None where none of them is asked for."""
        shard_rows = self._by_shard[shard].held
        if not len(shard_rows):
            return None
        held = self.cache.read(self.cache.shards[shard])
        targets = (
            _Dense(held.logits[shard_rows]) if isinstance(held, LogitRows) else held.entries.take(shard_rows)
        )
        return _Held(targets, read_states(self.cache, shard, self.hidden, shard_rows, held.num_tokens))

    def _window(
        self, shards: Iterable[int], parts: Iterator["_Held | None"]
    ) -> tuple[npt.NDArray[np.int64], "_Held"]:
        """(rows of the dataset, what the cache holds of them) of some shards; the next `parts` are theirs."""
        rows: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        dense = [np.zeros((0, self.cache.identity.spec.num_outputs), np.float32)]
        sparse = []
        hidden: list[dict[str, States]] = []
        for shard, held in zip(shards, parts, strict=False):
            if held is None:
                continue
            rows.append(self._by_shard[shard].rows)
            if isinstance(held.targets, _Dense):
                dense.append(held.targets.logits)
            else:
                sparse.append(held.targets)
            hidden.append(held.hidden)
        targets = concatenate(sparse) if sparse else _Dense(np.concatenate(dense))
        return np.concatenate(rows), _Held(targets, concatenate_states(hidden))

    def _own(
        self, rows: npt.NDArray[np.int64], batch: npt.NDArray[np.int64], window: "_Held"
    ) -> DistillBatch:
        """This rank's part of a global batch; `batch` are the places of its rows in the window."""
        if self._stream.ranks == 1:
            return self._batch(rows, window.take(batch))
        own = order.part(np.arange(len(rows)), self._stream.rank, self._stream.ranks)
        whole = GlobalBatch(
            self._stream.ranks, len(rows), len(rows), int(has_label(self._truth[rows]).sum()), not len(own)
        )
        own = own if len(own) else np.zeros(1, np.int64)
        return self._batch(rows[own], window.take(batch[own]))._replace(whole=whole)

    def _batch(self, rows: npt.NDArray[np.int64], held: "_Held") -> DistillBatch:
        targets = held.targets
        teacher: torch.Tensor | SparseTargets | MixedTargets = (
            torch.from_numpy(targets.logits) if isinstance(targets, _Dense) else SparseTargets.of(targets)
        )
        if self._others_MNC is not None and isinstance(self.cache, Mixture) and isinstance(targets, _Dense):
            logits_MBC = np.concatenate([targets.logits[None], self._others_MNC[:, rows]])
            teacher = MixedTargets(torch.from_numpy(logits_MBC), torch.from_numpy(self.cache.weights_M))
        hidden = {name: torch.from_numpy(states.values) for name, states in held.hidden.items()}
        inputs = input_tensors(self.tokens.padded(rows, self.pad_id))
        return DistillBatch(inputs, torch.from_numpy(self._truth[rows]), teacher, hidden)


class _Dense(NamedTuple):
    """Logits of N rows, taken in the same way as entries."""

    logits: npt.NDArray[np.float32]  # N x C

    def take(self, rows: npt.NDArray[np.int64]) -> "_Dense":
        return _Dense(self.logits[rows])


class _Held(NamedTuple):
    """What a cache holds of N rows."""

    targets: "_Dense | Entries"
    hidden: dict[str, States]

    def take(self, rows: npt.NDArray[np.int64]) -> "_Held":
        return _Held(self.targets.take(rows), {name: s.take(rows) for name, s in self.hidden.items()})
