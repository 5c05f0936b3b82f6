"""The batch that a student sees in one step, and what all streams of batches share.

Shape letters: B batch, L tokens, C classes, T targets: of B rows, or of their true tokens, row after row.
"""

from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from pipeline.data.rows import NO_LABEL, Rows
from pipeline.losses.divergences import MixedTargets
from pipeline.losses.sparse import SparseTargets
from pipeline.streaming.model_inputs import num_rows, on_device
from pipeline.streaming.prefetch import prefetch
from storage import Cache
from storage.entries import ends

SHARDS_PER_WINDOW = 16  # rows are mixed within a window: 65,536 rows at the default shard size
BUCKET_BATCHES = 50  # rows of similar length meet within this many batches
PREFETCH_BYTES = 32 * 2**20


class Stream(NamedTuple):
    """Who reads: one of several ranks that share each batch, one of several workers that take turns in making
    the batches of a rank, and how many threads it reads with.

    Batches, and the order of their rows, are the same for every choice.
    """

    rank: int = 0
    ranks: int = 1
    readers: int = 1  # threads besides the one that trains: one makes batches, others decode shards for it
    decoded_bytes: int = 0  # of local disk for decoded shards, which later epochs read as they are
    worker: int = 0  # makes the batches whose number, from the first that is read on, leaves this rest
    workers: int = 1


ALONE = Stream()


class GlobalBatch(NamedTuple):
    """The global batch that a batch is one rank's part of."""

    ranks: int
    rows: int
    targets: int
    labelled: int  # targets that have a label
    empty: bool  # nothing of it was left for this rank: what it sees instead counts nothing


class DistillBatch(NamedTuple):
    """What a student sees in one step."""

    inputs: dict[str, torch.Tensor]  # what models read, by name: see Tokens.padded and Pixels.padded
    labels_T: torch.Tensor  # int64, NO_LABEL for none; float32 [T, C], nan for none (Rows.truth)
    # float32 logits [T, C]; those of several teachers; or entries of the T targets
    teacher: torch.Tensor | SparseTargets | MixedTargets
    # What the teacher thought, float32 by name: [B, W] pooled, [all true tokens, W] in the order of the mask.
    hidden: dict[str, torch.Tensor] = {}  # noqa: RUF012 (a default of NamedTuple is never changed)
    whole: GlobalBatch | None = None  # None: this is all of it

    def to(self, device: torch.device) -> "DistillBatch":
        """The same batch on another device."""
        hidden = {name: states.to(device) for name, states in self.hidden.items()}
        inputs = on_device(self.inputs, device)
        return DistillBatch(inputs, self.labels_T.to(device), self.teacher.to(device), hidden, self.whole)

    @property
    def mask(self) -> torch.Tensor:
        """Of text: bool [B, L], true for tokens, false for padding."""
        return self.inputs["attention_mask"]

    @property
    def num_rows(self) -> int:
        """Rows, or pieces of long ones, of the global batch."""
        return self.whole.rows if self.whole else self.own_rows

    @property
    def own_rows(self) -> int:
        """Rows, or pieces of long ones, of this batch."""
        return num_rows(self.inputs)

    @property
    def num_targets(self) -> int:
        """Targets of the global batch: of its rows, or of their true tokens."""
        return self.whole.targets if self.whole else len(self.labels_T)

    @property
    def shares(self) -> tuple[float, float]:
        """What a mean over this batch's targets, and one over its labelled ones, counts.

        The mean of all ranks' means, each times this, is the mean over the global batch. 1 where it is whole.
        """
        if self.whole is None:
            return 1.0, 1.0
        if self.whole.empty:
            return 0.0, 0.0
        ranks, own = self.whole.ranks, int(has_label(self.labels_T.numpy(force=True)).sum())
        return (
            ranks * len(self.labels_T) / self.whole.targets,
            ranks * own / max(self.whole.labelled, 1),
        )

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        teacher = [self.teacher] if isinstance(self.teacher, torch.Tensor) else self.teacher
        parts = [*self.inputs.values(), self.labels_T, *teacher, *self.hidden.values()]
        return sum(tensor.nbytes for tensor in parts)


def has_label(truth: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of these labels [T] (or numbers [T, C], nan for none) there are."""
    there: npt.NDArray[np.bool_] = (
        ~np.isnan(truth).any(-1) if np.issubdtype(truth.dtype, np.floating) else truth != NO_LABEL
    )
    return there


class RowPlaces(NamedTuple):
    """Rows of a dataset and where one shard of a cache holds them."""

    rows: npt.NDArray[np.int64]  # of the dataset
    held: npt.NDArray[np.int64]  # of the shard


def locate_rows(cache: Cache, rows: Rows, splits: tuple[str, ...]) -> list[RowPlaces]:
    """Where each shard holds the rows of these splits: a few integers a row.

    Raises SpecMismatch where the cache lacks a row.
    """
    chosen = rows.select(*splits)
    wanted = rows.row_ids.take(chosen)
    cache.check("this dataset", labels=rows.label_names, row_ids=wanted)
    place = pc.index_in(wanted, value_set=cache.row_ids()).to_numpy()
    starts = ends([shard.rows for shard in cache.shards])
    shard = np.searchsorted(starts, place, side="right") - 1
    by_shard = np.argsort(shard, kind="stable")
    cuts = np.searchsorted(shard[by_shard], np.arange(1, len(cache.shards)))
    return [
        RowPlaces(chosen[own], place[own] - first)
        for own, first in zip(np.split(by_shard, cuts), starts[:-1], strict=True)
    ]


def read_ahead(batches: Iterator[DistillBatch], readers: int) -> Generator[DistillBatch, None, None]:
    """The same batches, made by a thread a bounded number of bytes ahead; without `readers` by this one."""
    if readers == 0:
        return (batch for batch in batches)
    return prefetch(batches, PREFETCH_BYTES, lambda batch: batch.num_bytes)
