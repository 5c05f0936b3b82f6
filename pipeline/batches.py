"""Cached shards -> training batches, in an order that is a function of (seed, epoch, position) alone.

Labels and splits come from the prepared dataset, targets from the cache, joined by row_id. One window of
shards is in memory at a time; a thread reads and decodes it, a bounded number of bytes ahead, so a step does
not wait. This file has rows with one target each; documents.py has those with a target a token.

Shape letters: B batch, L tokens, C classes, T targets: of B rows, or of their true tokens, row after row.
"""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from pipeline.cached_states import States, laid_end_to_end, narrowed, read_states, refuse_unkept
from pipeline.data import Rows
from pipeline.inputs import Inputs
from pipeline.losses import MixedTargets, SparseTargets
from storage import Cache, order
from storage.entries import Entries, concatenate, ends
from storage.errors import Mismatch, SpecMismatch
from storage.mixture import Mixture
from storage.records import LogitRows

SHARDS_PER_WINDOW = 16  # rows are mixed within a window: 65,536 rows at the default shard size
BUCKET_BATCHES = 50  # rows of like length meet within so many batches
PREFETCH_BYTES = 32 * 2**20

Item = TypeVar("Item")


class DistillBatch(NamedTuple):
    """What a student sees in one step."""

    ids_BL: torch.Tensor  # int64, padded on the right; of images pixels, uint8
    mask_BL: torch.Tensor  # bool, true for tokens
    labels_T: torch.Tensor  # int64, NO_LABEL for none; float32 [T, C], nan for none (Rows.truth)
    # float32 logits [T, C]; those of several teachers; or entries of the T targets
    teacher: torch.Tensor | SparseTargets | MixedTargets
    # What the teacher thought, float32 by name: [B, W] pooled, [all true tokens, W] in the order of the mask.
    hidden: dict[str, torch.Tensor] = {}  # noqa: RUF012 (a default of NamedTuple is never changed)

    def to(self, device: torch.device) -> "DistillBatch":
        """The same batch on another device."""
        hidden = {name: states.to(device) for name, states in self.hidden.items()}
        ids, mask, labels = (part.to(device) for part in self[:3])
        return DistillBatch(ids, mask, labels, self.teacher.to(device), hidden)

    @property
    def num_rows(self) -> int:
        """Rows, or pieces of long ones."""
        return len(self.ids_BL)

    @property
    def num_targets(self) -> int:
        """Of its rows, or of their true tokens."""
        return len(self.labels_T)

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        parts = [*self[:3], *([self.teacher] if isinstance(self.teacher, torch.Tensor) else self.teacher)]
        return sum(tensor.nbytes for tensor in [*parts, *self.hidden.values()])


class Place(NamedTuple):
    """Rows of a dataset and where one shard of a cache holds them."""

    rows: npt.NDArray[np.int64]  # of the dataset
    held: npt.NDArray[np.int64]  # of the shard


def places(cache: Cache, rows: Rows, splits: tuple[str, ...]) -> list[Place]:
    """Where each shard holds the rows of these splits: a few integers a row.

    Raises SpecMismatch where the cache lacks a row.
    """
    chosen = rows.select(*splits)
    wanted = rows.row_ids.take(chosen)
    cache.check("this dataset", labels=rows.label_names, row_ids=wanted)
    place = pc.index_in(wanted, value_set=cache.row_ids()).to_numpy()
    starts = np.cumsum([0] + [shard.rows for shard in cache.shards])
    shard = np.searchsorted(starts, place, side="right") - 1
    return [Place(chosen[shard == i], place[shard == i] - starts[i]) for i in range(len(cache.shards))]


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
    ) -> None:
        refuse_unkept(cache, hidden)
        self.cache, self.rows, self.tokens, self.pad_id, self.hidden = cache, rows, tokens, pad_id, hidden
        self._truth = rows.truth
        self._by_shard = places(cache, rows, splits)
        # Of a mixture, the first cache is read shard by shard; the logits of the others are in memory.
        self._others_MNC = cache.others(rows.row_ids) if isinstance(cache, Mixture) else None
        self.num_rows = sum(len(place.rows) for place in self._by_shard)
        self._shards_per_window = narrowed(SHARDS_PER_WINDOW, cache, hidden)
        if hidden and cache.hidden_per_position:
            self._refuse_other_tokens()

    def num_batches(self, batch_rows: int) -> int:
        """At most so many batches an epoch; windows may end in short ones."""
        sizes = [len(rows) for rows, _ in self._by_shard]
        windows = -(-len(sizes) // self._shards_per_window)
        return -(-self.num_rows // batch_rows) + windows - 1

    def epoch(self, seed: int, epoch: int, batch_rows: int) -> Generator[DistillBatch, None, None]:
        """The batches of one training epoch, prefetched. The order depends on (seed, epoch) alone."""
        return prefetch(self._epoch(seed, epoch, batch_rows), PREFETCH_BYTES, lambda batch: batch.num_bytes)

    def in_order(self, batch_rows: int) -> Iterator[DistillBatch]:
        """All rows once, those of like length together: for evaluation."""
        rows, held = self._window(range(len(self._by_shard)))
        by_length = np.argsort(self.tokens.lengths[rows], kind="stable")
        for start in range(0, len(rows), batch_rows):
            part = by_length[start : start + batch_rows]
            yield self._batch(rows[part], held.take(part))

    def _epoch(self, seed: int, epoch: int, batch_rows: int) -> Iterator[DistillBatch]:
        windows = order.windows(len(self._by_shard), self._shards_per_window, seed, epoch)
        for number, shards in enumerate(windows):
            rows, held = self._window(sorted(int(shard) for shard in shards))
            lengths = self.tokens.lengths[rows]
            for part in order.batches(lengths, batch_rows, BUCKET_BATCHES, seed, epoch, number):
                yield self._batch(rows[part], held.take(part))

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

    def _window(self, shards: Iterable[int]) -> tuple[npt.NDArray[np.int64], "_Held"]:
        """(rows of the dataset, what the cache holds of them) of some shards."""
        rows: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        dense = [np.zeros((0, self.cache.identity.spec.num_outputs), np.float32)]
        sparse = []
        hidden: list[dict[str, States]] = []
        for shard in shards:
            dataset_rows, shard_rows = self._by_shard[shard]
            if not len(dataset_rows):
                continue
            rows.append(dataset_rows)
            held = self.cache.read(self.cache.shards[shard])
            if isinstance(held, LogitRows):
                dense.append(held.logits[shard_rows])
            else:
                sparse.append(held.entries.take(shard_rows))
            hidden.append(read_states(self.cache, shard, self.hidden, shard_rows, held.num_tokens))
        targets = concatenate(sparse) if sparse else _Dense(np.concatenate(dense))
        return np.concatenate(rows), _Held(targets, laid_end_to_end(hidden))

    def _batch(self, rows: npt.NDArray[np.int64], held: "_Held") -> DistillBatch:
        targets = held.targets
        ids_BL, mask_BL = self.tokens.padded(rows, self.pad_id)
        labels_T = self._truth[rows]
        teacher: torch.Tensor | SparseTargets | MixedTargets = (
            torch.from_numpy(targets.logits) if isinstance(targets, _Dense) else SparseTargets.of(targets)
        )
        if self._others_MNC is not None and isinstance(self.cache, Mixture) and isinstance(targets, _Dense):
            logits_MBC = np.concatenate([targets.logits[None], self._others_MNC[:, rows]])
            teacher = MixedTargets(torch.from_numpy(logits_MBC), torch.from_numpy(self.cache.weights_M))
        ids, mask, labels = (torch.from_numpy(array) for array in (ids_BL, mask_BL, labels_T))
        hidden = {name: torch.from_numpy(states.values) for name, states in held.hidden.items()}
        return DistillBatch(ids, mask, labels, teacher, hidden)


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


def prefetch(
    items: Iterable[Item], max_bytes: int, size: Callable[[Item], int]
) -> Generator[Item, None, None]:
    """The same items, made by a thread that stays at most `max_bytes` (or one item) ahead.

    Its errors are raised here, in their place. Closing the iterator early ends the thread.
    """
    ahead = _Ahead(max_bytes)
    ready: queue.SimpleQueue[Item | Exception | None] = queue.SimpleQueue()

    def produce() -> None:
        try:
            for item in items:
                if not ahead.wait_and_take(size(item)):
                    return
                ready.put(item)
            ready.put(None)
        except Exception as error:
            ready.put(error)  # raised where the item would have been used

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            ahead.give_back(size(item))
            yield item
    finally:
        ahead.close()
        thread.join()


class _Ahead:
    """How many bytes a producer is ahead of its consumer, with a limit that it waits at."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._closed = limit, 0, False
        self._changed = threading.Condition()

    def wait_and_take(self, num_bytes: int) -> bool:
        """Wait for room and take it; False where nobody wants more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._held or self._held + num_bytes <= self._limit
            )
            self._held += num_bytes
            return not self._closed

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._held -= num_bytes
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
