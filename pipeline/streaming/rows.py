"""Cached shards -> training batches of rows with one target each.

Labels and splits come from the prepared dataset, targets from the cache, joined by row_id. One window of
shards is in memory at a time; threads read and decode it, a bounded number of bytes ahead, so a step does
not wait. epochs.py has the order; documents.py reads caches with a target for each token.

Shape letters: B batch, L tokens, C classes, T targets: one for each of the B rows.
"""

from collections.abc import Iterable, Iterator, Sequence
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
    Stream,
    has_label,
    locate_rows,
)
from pipeline.streaming.epochs import Indices, PlannedWindow, ShardStream
from pipeline.streaming.hidden_states import (
    States,
    check_hidden_kept,
    concatenate_states,
    read_states,
    shards_in_memory,
)
from pipeline.streaming.model_inputs import input_tensors
from storage import Cache, order
from storage.entries import Entries, concatenate, ends
from storage.errors import Mismatch, SpecMismatch
from storage.mixture import Mixture
from storage.records import LogitRows


class CachedRows(ShardStream["_Held | None"]):
    """The rows of some splits of a dataset with the targets that a cache holds for them.

    `tokens` are the inputs of all rows of the dataset; `hidden` are names of `Cache.hidden_names`, which are
    read too. Raises SpecMismatch where the cache lacks a row or a name, and where it has a state for each
    token and the student has other tokens than the teacher.
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
        self._truth = rows.truth
        self._by_shard = locate_rows(cache, rows, splits)
        # Of a mixture, the first cache is read shard by shard; the logits of the others are in memory.
        self._others_MNC = cache.others(rows.row_ids) if isinstance(cache, Mixture) else None
        self.num_rows = sum(len(place.rows) for place in self._by_shard)
        super().__init__(len(self._by_shard), shards_in_memory(SHARDS_PER_WINDOW, cache, hidden), stream)
        if hidden and cache.hidden_per_position:
            self._check_same_tokens()

    def num_batches(self, batch_rows: int) -> int:
        """The most batches that an epoch has; windows may end in short ones."""
        windows = -(-len(self._by_shard) // self._shards_per_window)
        return -(-self.num_rows // batch_rows) + windows - 1

    def num_steps(self, seed: int, epochs: int, batch_rows: int) -> int:
        """The most batches of all epochs: what a schedule is planned for."""
        return epochs * self.num_batches(batch_rows)

    def epoch_length(self, seed: int, epoch: int, batch_size: int) -> int:
        """The number of batches of an epoch, from the sizes of its windows alone."""
        windows = order.windows(self._num_shards, self._shards_per_window, seed, epoch)
        return sum(-(-sum(len(self._by_shard[s].rows) for s in window) // batch_size) for window in windows)

    def _check_same_tokens(self) -> None:
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

    def _lengths(self, shards: Sequence[int]) -> Indices:
        return self.tokens.lengths[self._rows_of(shards)]

    def _cut(self, lengths: Indices, batch_size: int, *key: int) -> Iterator[Indices]:
        return order.batches(lengths, batch_size, BUCKET_BATCHES, *key)

    def _plan_in_order(self, batch_size: int) -> Iterator[PlannedWindow]:
        for first in range(0, self._num_shards, self._shards_per_window):
            shards = list(range(first, min(first + self._shards_per_window, self._num_shards)))
            by_length = np.argsort(self._lengths(shards), kind="stable")
            cuts = range(batch_size, len(by_length), batch_size)
            if len(by_length):
                yield PlannedWindow(shards, iter(np.split(by_length, cuts)))

    def _rows_of(self, shards: Sequence[int]) -> Indices:
        """Rows of the dataset in the order of a window of these shards."""
        return np.concatenate([np.zeros(0, np.int64), *(self._by_shard[shard].rows for shard in shards)])

    def _read(self, shard: int) -> "_Held | None":
        """What the cache holds of the rows of one shard; None where it has none of these splits."""
        shard_rows = self._by_shard[shard].held
        if not len(shard_rows):
            return None
        held = self.cache.read(self.cache.shards[shard])
        targets = (
            _Dense(held.logits[shard_rows]) if isinstance(held, LogitRows) else held.entries.take(shard_rows)
        )
        return _Held(targets, read_states(self.cache, shard, self.hidden, shard_rows, held.num_tokens))

    def _window(self, shards: Sequence[int], parts: Iterable["_Held | None"]) -> "_Window":
        held = [part for part in parts if part is not None]
        none = np.zeros((0, self.cache.identity.spec.num_outputs), np.float32)
        sparse = [part.targets for part in held if not isinstance(part.targets, _Dense)]
        dense = [part.targets.logits for part in held if isinstance(part.targets, _Dense)]
        targets = concatenate(sparse) if sparse else _Dense(np.concatenate([none, *dense]))
        states = concatenate_states([part.hidden for part in held])
        return _Window(self, self._rows_of(shards), _Held(targets, states))

    def num_labelled(self, rows: Indices) -> int:
        """How many of these rows of the dataset have a label."""
        return int(has_label(self._truth[rows]).sum())

    def batch(self, rows: Indices, held: "_Held") -> DistillBatch:
        """The batch of these rows of the dataset, with what the cache holds of them."""
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


class _Window(NamedTuple):
    """Some shards in memory: their rows of the dataset, and what the cache holds of them."""

    owner: CachedRows
    rows: Indices
    held: "_Held"

    def batch(self, items: Indices) -> DistillBatch:
        return self.owner.batch(self.rows[items], self.held.take(items))

    def num_targets(self, items: Indices) -> int:
        return len(items)

    def num_labelled(self, items: Indices) -> int:
        return self.owner.num_labelled(self.rows[items])


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
