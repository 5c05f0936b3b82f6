"""One epoch of a cache as batches: windows of shards, this rank's part of each batch, from any place on.

What streams of rows (rows.py) and of documents (documents.py) share. An item is what a batch is made of: a
row, or a piece of a document. The order of items is a function of (seed, epoch, position) alone; how many
threads read, and how many ranks share a batch, changes no batch.

Shape letters: N items.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.streaming.batch import DistillBatch, GlobalBatch, Stream, read_ahead
from pipeline.streaming.prefetch import decode_ahead
from storage import order

Indices = npt.NDArray[np.int64]


class Window(Protocol):
    """The items of some shards in memory, numbered in the order of the shards."""

    def batch(self, items: Indices) -> DistillBatch:
        """A batch of these items."""

    def num_targets(self, items: Indices) -> int:
        """Targets of these items."""

    def num_labelled(self, items: Indices) -> int:
        """Targets of these items that have a label."""


class PlannedWindow(NamedTuple):
    """A window before it is read."""

    shards: list[int]
    batches: Iterator[Indices]  # items of each batch


Part = TypeVar("Part")  # what a subclass keeps of one shard in memory


class ShardStream(ABC, Generic[Part]):
    """The batches of an epoch. Subclasses read shards, and cut the items of a window into batches."""

    def __init__(self, num_shards: int, shards_per_window: int, stream: Stream) -> None:
        self._num_shards, self._shards_per_window, self.stream = num_shards, shards_per_window, stream

    def epoch(
        self, seed: int, epoch: int, batch_size: int, start: int = 0
    ) -> Generator[DistillBatch, None, None]:
        """The batches of one training epoch from the `start`th on, read ahead.

        `batch_size`: rows, or tokens with padding. The order depends on (seed, epoch) alone; shards whose
        batches all come before `start` are not read.
        """
        batches = self._epoch(seed, epoch, batch_size, start)
        return read_ahead(batches, self.stream.readers)

    def in_order(self, batch_size: int) -> Iterator[DistillBatch]:
        """All items once, those of like length together: for evaluation. All of each batch, on every rank."""
        for shards, batches in self._plan_in_order(batch_size):
            window = self._window(shards, map(self._read, shards))
            for items in batches:
                yield window.batch(items)

    def plan(self, seed: int, epoch: int, batch_size: int) -> Iterator[PlannedWindow]:
        """The windows of an epoch, from the lengths of items alone."""
        shuffled = order.windows(self._num_shards, self._shards_per_window, seed, epoch)
        for number, shards in enumerate(shuffled):
            chosen = sorted(int(shard) for shard in shards)
            lengths = self._lengths(chosen)
            if len(lengths):
                yield PlannedWindow(chosen, self._cut(lengths, batch_size, seed, epoch, number))

    def epoch_length(self, seed: int, epoch: int, batch_size: int) -> int:
        """The number of batches that `epoch` gives without `start`, of all workers."""
        return sum(len(list(window.batches)) for window in self.plan(seed, epoch, batch_size))

    def _epoch(self, seed: int, epoch: int, batch_size: int, start: int) -> Iterator[DistillBatch]:
        windows = list(_from_batch(start, self.plan(seed, epoch, batch_size)))
        reading = [partial(self._read, shard) for shards, _ in windows for shard in shards]
        with decode_ahead(reading, self.stream.readers) as parts:
            number = 0
            for shards, batches in windows:
                window = self._window(shards, itertools.islice(parts, len(shards)))
                for items in batches:
                    if number % self.stream.workers == self.stream.worker:
                        yield self._own_part(items, window)
                    number += 1
                del window  # before the next one is read

    def _own_part(self, items: Indices, window: Window) -> DistillBatch:
        """This rank's part of a global batch."""
        rank, ranks = self.stream.rank, self.stream.ranks
        if ranks == 1:
            return window.batch(items)
        own, targets = order.part(items, rank, ranks), window.num_targets(items)
        whole = GlobalBatch(ranks, len(items), targets, window.num_labelled(items), not len(own))
        return window.batch(own if len(own) else items[:1])._replace(whole=whole)

    @abstractmethod
    def _lengths(self, shards: Sequence[int]) -> Indices:
        """Tokens of each item of these shards [N]."""

    @abstractmethod
    def _cut(self, lengths: Indices, batch_size: int, *key: int) -> Iterator[Indices]:
        """Items of these lengths in batches, in an order that depends on `key` alone."""

    @abstractmethod
    def _plan_in_order(self, batch_size: int) -> Iterator[PlannedWindow]:
        """All windows for evaluation."""

    @abstractmethod
    def _read(self, shard: int) -> Part:
        """The items of one shard; called by several threads."""

    @abstractmethod
    def _window(self, shards: Sequence[int], parts: Iterable[Part]) -> Window:
        """The items of some shards; `parts` has what `_read` returned for each."""


def _from_batch(start: int, windows: Iterable[PlannedWindow]) -> Iterator[PlannedWindow]:
    """The same windows without the first `start` batches; windows that have no other are left out."""
    for window in windows:
        if not start:
            yield window
            continue
        batches = list(window.batches)
        if start < len(batches):
            yield window._replace(batches=iter(batches[start:]))
        start = max(0, start - len(batches))
