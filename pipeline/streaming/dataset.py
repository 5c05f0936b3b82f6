"""A cache and the prepared rows it was captured from, as a torch dataset of ready batches.

    data = CachedDataset("caches/reviews", "data/reviews", split="train", batch_size=64, max_length=128)
    loader = DataLoader(data, batch_size=None)     # batches are made here, not by the loader

plain_batch.py has what a batch holds. The order of batches is the one of a run with the same seed and sizes.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.config.tasks import TASKS, tasks_with
from pipeline.data.inputs import PixelReader, read_inputs
from pipeline.data.rows import POOL, SPLITS, VIEWS, Rows
from pipeline.data.tokenizer import TextReader
from pipeline.runtime import hardware
from pipeline.streaming.batch import Stream
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.plain_batch import PlainBatch, plain_batch
from pipeline.streaming.rows import CachedRows
from pipeline.streaming.verified import check_verified, open_rows
from storage import Cache
from storage.errors import ConfigError, DataError, Mismatch, SpecMismatch
from storage.location import Url, location
from storage.mixture import Mixture, open_cache

BATCH_ROWS, BATCH_TOKENS = 64, 2048
ROW_LENGTH, PIECE_LENGTH = 128, 512  # tokens


class CachedDataset(IterableDataset[PlainBatch]):
    """The rows of a split with the teacher's targets for them, in batches. Iterating gives one epoch (or the
    number in `epochs`), iterating again the next, in another order: a function of (seed, epoch) alone.

    `state_dict` and `load_state_dict` continue in the middle of an epoch, with the batch after the last one
    that was returned.

    Several ranks share each batch: `batch_size` counts the rows of all, every rank gets its part of them, and
    all have the same number of batches. Do not let accelerate `prepare` a loader of several ranks: it would
    split the parts again. Workers of a DataLoader take turns, so that batches come in the same order for any
    number of them. Workers do not know how far the loader is: call `set_epoch` before each epoch, and give
    `state_dict` the number of batches.
    """

    def __init__(  # one dataset is described by one call: every parameter past the second has a default
        self,
        cache: Cache | str | Path,
        rows: str | Path,
        *,
        split: str = "train",
        pool: bool = False,
        views: int = 0,
        view_labels: bool = False,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        tokenizer: str | Path | None = None,
        hidden: Sequence[str] = (),
        seed: int = 0,
        epochs: int = 1,
        rank: int | None = None,
        num_ranks: int | None = None,
        readers: int = 1,
        verified: str | Path | None = None,
    ) -> None:
        """`cache`: a cache, a mixture, or the path or URL of one. `rows`: the directory of prepared rows.

        split             train, validation, test or pool
        pool              also the unlabelled pool; this, views and view_labels are as in a recipe
        batch_size        rows a batch; None: 64
        batch_tokens      tokens a batch, padding included, with a target for each token; None: 2048
        max_length        texts are cut after that many tokens, documents are read in pieces of that many;
                          None: 128 and 512
        tokenizer         a directory with tokenizer.json; None: the teacher's, from the cache
        hidden            names of `Cache.hidden_names` to read along
        epochs            how many one iteration gives: for trainers that take all epochs to be equally long
        rank, num_ranks   None: those of torch.distributed, or of torchrun
        readers           threads that read ahead
        verified          the record of the verify stage, verified/NAME.json; None: any cache is read, such as
                          one that was verified where it was made. Its bytes are checked in either case

        Raises SpecMismatch where the cache does not fit the rows, the tokenizer or the names in `hidden`, or
        is not the one that was verified; ConfigError for arguments that do not fit the cache; DataError where
        the split is empty.
        """
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        if epochs < 1:
            raise ConfigError(f"epochs: {epochs}, expected 1 or more.")
        self.seed, self._epochs, self._readers, self._ranks = seed, epochs, readers, (rank, num_ranks)
        self._epoch = self._batch = self._start = 0
        self._with_workers = torch.zeros(1, dtype=torch.bool)
        self._with_workers.share_memory_()  # type: ignore[no-untyped-call]
        self._num_batches: dict[int, int] = {}
        self._own_ranks()
        self._open()

    def _open(self) -> None:
        """Open and check everything that the arguments name."""
        given = self._arguments
        where = given["cache"]
        self.cache = where if isinstance(where, Cache) else _open_cache(where)
        if given["verified"] is not None:
            check_verified(self.cache, Path(given["verified"]))
        spec = self.cache.identity.spec
        self._by_tokens = spec.per_position
        splits = self._splits()
        rows = open_rows(self.cache, Path(given["rows"])).with_views(given["views"], given["view_labels"])
        rows = rows.only(*splits)
        if not len(rows.row_ids):
            raise DataError(f"{given['rows']} has no rows of the split {' or '.join(splits)}.")
        self._batch_size = self._size(spec.per_position)
        self._cached = self._stream_of(rows, splits)

    def _splits(self) -> tuple[str, ...]:
        given = self._arguments
        if given["split"] not in (*SPLITS, POOL):
            raise ConfigError(f"split: {given['split']!r}, expected {', '.join(SPLITS)} or {POOL}.")
        extra = ((POOL,) if given["pool"] else ()) + ((VIEWS,) if given["views"] else ())
        if extra and given["split"] != "train":
            raise ConfigError(f"pool and views are added to the split train, not to {given['split']!r}.")
        return (given["split"], *extra)

    def _size(self, by_tokens: bool) -> int:
        used, other = ("batch_tokens", "batch_size") if by_tokens else ("batch_size", "batch_tokens")
        if self._arguments[other] is not None:
            has = "a target for each token" if by_tokens else "one target a row"
            raise ConfigError(f"{self.cache.path} has {has}: write {used} instead of {other}.")
        size: int | None = self._arguments[used]
        if size is not None and size < 1:
            raise ConfigError(f"{used}: {size}, expected 1 or more.")
        return size or (BATCH_TOKENS if by_tokens else BATCH_ROWS)

    def _stream_of(self, rows: Rows, splits: tuple[str, ...]) -> CachedRows | CachedDocuments:
        spec, given = self.cache.identity.spec, self._arguments
        hidden, max_length = tuple(given["hidden"]), given["max_length"]
        if spec.per_position:
            if not TASKS[spec.task].predicts_next:
                raise SpecMismatch(
                    f"{self.cache.path} cannot be read as batches of documents",
                    [Mismatch("spec.task", spec.task, tasks_with(predicts_next=True))],
                    "No student learns from such a cache yet. Its rows: Cache.read.",
                )
            if given["tokenizer"] is not None:
                _check_same_tokenizer(self.cache, Path(given["tokenizer"]))
            return CachedDocuments(self.cache, rows, splits, max_length or PIECE_LENGTH, hidden)
        if spec.image is not None:
            reader: TextReader | PixelReader = PixelReader(math.prod(rows.shape))
        else:
            directory = Path(given["tokenizer"] or self.cache.tokenizer_dir)
            reader = TextReader(directory, max_length or ROW_LENGTH, "truncate")
        return CachedRows(self.cache, rows, read_inputs(reader, rows), reader.pad_id, splits, hidden)

    def __len__(self) -> int:
        """Batches of the current epoch, or of all `epochs` that it belongs to; the same for each rank."""
        first = self._epoch - self._epoch % self._epochs
        return sum(self._length(epoch) for epoch in range(first, first + self._epochs))

    def _length(self, epoch: int) -> int:
        if epoch not in self._num_batches:
            self._num_batches[epoch] = self._cached.epoch_length(self.seed, epoch, self._batch_size)
        return self._num_batches[epoch]

    def num_steps(self, epochs: int) -> int:
        """The steps that a run of this many epochs plans its learning rate for."""
        return self._cached.num_steps(self.seed, epochs, self._batch_size)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to; the first is 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration starts with, from its first batch on.

        The current epoch changes nothing: a loaded state is continued.
        """
        if epoch != self._epoch:
            self._epoch, self._batch, self._start = epoch, 0, 0

    def state_dict(self, batch: int | None = None) -> dict[str, Any]:
        """Where the iteration is, as JSON. `batch`: batches of the current epoch that were used; None: all
        that were returned, which workers of a DataLoader do not know.
        """
        if batch is None and self._with_workers.item() and get_worker_info() is None:
            raise ConfigError(
                "workers of a DataLoader read ahead: the dataset does not know which batch was used last.\n"
                "Give the number of batches of this epoch that were used: state_dict(batch=n)."
            )
        position = {"epoch": self._epoch, "batch": self._batch if batch is None else batch}
        return {**position, "order": self._order()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch where `state_dict` was called; ranks and workers may be others.

        Raises ConfigError where the state is of batches in another order.
        """
        if (found := state["order"]) != (expected := self._order()):
            differing = [key for key in expected if found.get(key) != expected[key]]
            lines = [f"  {key}: {found.get(key)} in the state, {expected[key]} here" for key in differing]
            raise ConfigError("the state is of batches in another order:\n" + "\n".join(lines))
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._start = self._batch

    def __iter__(self) -> Generator[PlainBatch, None, None]:
        """The batches that are left of the current epoch, or of all `epochs` that it belongs to."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            self._with_workers.fill_(True)
        start, self._start = self._start, 0
        for epoch in range(self._epoch, self._epoch - self._epoch % self._epochs + self._epochs):
            yield from self._one_epoch(epoch, start, worker, workers)
            worker, start = (worker - self._length(epoch) + start) % workers, 0  # workers go on taking turns

    def _one_epoch(
        self, epoch: int, start: int, worker: int, workers: int
    ) -> Generator[PlainBatch, None, None]:
        """This worker's batches of an epoch from the `start`th on. The position is set before each."""
        rank, ranks = self._own_ranks()
        self._cached.stream = Stream(rank, ranks, self._readers, 0, worker, workers)
        self._epoch, self._batch, last = epoch, start, self._length(epoch)
        with closing(self._cached.epoch(self.seed, epoch, self._batch_size, start)) as batches:
            for number, batch in zip(range(start + worker, last, workers), batches, strict=True):
                self._batch = number + workers - worker
                if number + workers >= last:
                    self._epoch, self._batch = epoch + 1, 0
                yield plain_batch(batch, self.cache.identity.spec)
        self._epoch, self._batch = epoch + 1, 0  # also where no batch was this worker's

    def _own_ranks(self) -> tuple[int, int]:
        rank, num_ranks = self._ranks
        if (rank is None) != (num_ranks is None):
            raise ConfigError("rank and num_ranks belong together: give both, or neither.")
        if rank is not None and num_ranks is not None:
            if not 0 <= rank < num_ranks:
                raise ConfigError(f"rank: {rank}, expected 0 to {num_ranks - 1}.")
            return rank, num_ranks
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return hardware.ranks()

    def _order(self) -> dict[str, Any]:
        """What decides the order of batches."""
        given = self._arguments
        return {
            "cache": self.cache.manifest_sha256, "rows": self._cached.num_rows, "split": given["split"],
            "pool": given["pool"], "views": given["views"], "seed": self.seed,
            "batch_tokens" if self._by_tokens else "batch_size": self._batch_size,
            "max_length": given["max_length"], "hidden": list(given["hidden"]),
        }  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are started, not forked: they open the cache again."""
        rank, ranks = self._own_ranks()
        where = self.cache.root if isinstance(self.cache, Mixture) else self.cache.path
        kept = {name: value for name, value in self.__dict__.items() if name not in ("cache", "_cached")}
        return kept | {"_ranks": (rank, ranks), "_arguments": {**self._arguments, "cache": where}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _open_cache(where: str | Path | Url) -> Cache:
    place = location(where) if isinstance(where, str) else where
    return Cache.open(place) if isinstance(place, Url) else open_cache(place)


def _check_same_tokenizer(cache: Cache, directory: Path) -> None:
    """Raise SpecMismatch where a language model's student would read other tokens than its teacher did."""
    known, reads = cache.identity.tokenizer, TextReader(directory, PIECE_LENGTH, "truncate").identity()
    assert known is not None
    faults = [
        Mismatch(f"tokenizer.{field}", getattr(known, field), getattr(reads, field))
        for field in ("content", "vocab_size")
        if getattr(known, field) != getattr(reads, field)
    ]
    if faults:
        raise SpecMismatch(
            f"{cache.path} does not fit the tokenizer in {directory}", faults,
            "A language model learns to predict the teacher's tokens: leave tokenizer out.",
        )  # fmt: skip
