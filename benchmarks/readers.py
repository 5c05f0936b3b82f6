"""One reader of bench_reader.py in a process of its own: `readers.py NAME DIRECTORY WORKERS EPOCHS [cold]`.

Each yields the same batches: padded token ids and their mask, the next tokens, and the entries of every
target as (position, id, weight). Prints JSON: seconds to the first batch, seconds of each epoch from its
start (the first one includes opening), targets, a checksum of the batches, peak memory in bytes.

    ours         storage.Cache and pipeline.streaming.documents, with all checks
    datasets     load_dataset("parquet", streaming=True) over the same shards, a buffer of rows, numpy
    webdataset   tar files of 512 rows; a row is one member of arrays ("ten", its own binary format)
    litdata      its optimized chunks; a row is a dictionary of numpy arrays
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS_A_BATCH = 20  # about as many targets as in a batch of BATCH_TOKENS
BATCH_TOKENS = 4096
BUFFER = 2048  # rows that are mixed
FIELDS = ("token_ids", "num_entries", "num_exact", "ids", "log_probs")

Batch = tuple[torch.Tensor, ...]
Epochs = Callable[[int], Iterable[Batch]]


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Rows as tensors, built with numpy alone; a row's last token has no target."""
    lengths = np.array([len(row["token_ids"]) for row in rows]) - 1
    mask_BL = np.arange(lengths.max()) < lengths[:, None]
    ids_BL = np.zeros(mask_BL.shape, np.int64)
    ids_BL[mask_BL] = np.concatenate([row["token_ids"][:-1] for row in rows])
    labels_T = np.concatenate([row["token_ids"][1:] for row in rows]).astype(np.int64)
    counts = [row["num_entries"][:-1].astype(np.int64) for row in rows]
    kept = [int(own.sum()) for own in counts]
    all_counts = np.concatenate(counts)
    positions_E = np.repeat(np.arange(len(all_counts)), all_counts)
    ids_E = np.concatenate([row["ids"][:num] for row, num in zip(rows, kept, strict=True)]).astype(np.int64)
    weights_E = np.exp(np.concatenate([row["log_probs"][:num] for row, num in zip(rows, kept, strict=True)]))
    arrays = (ids_BL, mask_BL, labels_T, positions_E, ids_E, weights_E)
    return tuple(torch.from_numpy(array) for array in arrays)


def ours(root: Path, workers: int) -> Epochs:
    """Reads as a training does."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import pyarrow as pa

    from pipeline.data.rows import Rows
    from pipeline.streaming.batch import Stream
    from pipeline.streaming.documents import CachedDocuments
    from storage import Cache

    cache = Cache.open(root / "cache")
    row_ids = cache.row_ids()
    num = len(row_ids)
    no_text = pa.array([""], pa.string()).take(pa.array(np.zeros(num, np.int64)))
    rows = Rows(row_ids, no_text, np.full(num, -1, np.int32), np.full(num, "train"), (), "causal-lm")
    stream = Stream(readers=workers, decoded_bytes=2**32)
    cached = CachedDocuments(cache, rows, ("train",), 10_000, stream=stream)

    def epoch(number: int) -> Iterator[Batch]:
        for batch in cached.epoch(0, number, BATCH_TOKENS):
            yield *batch.inputs.values(), batch.labels_T, *batch.teacher[:3]

    return epoch


def with_datasets(root: Path, workers: int) -> Epochs:
    """Streams as its documentation recommends for training."""
    import datasets

    files = sorted(str(path) for path in (root / "cache" / "logits").glob("*.parquet"))
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    stream = stream.select_columns(list(FIELDS)).with_format("numpy").shuffle(seed=0, buffer_size=BUFFER)

    def epoch(number: int) -> Iterable[Batch]:
        stream.set_epoch(number)
        return _loader(stream, workers)

    return epoch


def with_webdataset(root: Path, workers: int) -> Epochs:
    """Reads shards in random order, then mixes a buffer of rows."""
    import webdataset

    shards = sorted(str(path) for path in (root / "webdataset").glob("*.tar"))

    def epoch(number: int) -> Iterable[Batch]:
        stream = webdataset.WebDataset(
            shards, shardshuffle=len(shards), seed=number, workersplitter=webdataset.split_by_worker
        )
        rows = stream.shuffle(BUFFER).decode().to_tuple("row.ten").map(_named)
        return _loader(rows, workers)

    return epoch


def with_litdata(root: Path, workers: int) -> Epochs:
    """Reads with its own loader over its own chunks."""
    import litdata

    stream = litdata.StreamingDataset(str(root / "litdata"), shuffle=True, seed=0)
    loader = litdata.StreamingDataLoader(
        stream, batch_size=ROWS_A_BATCH, num_workers=workers, collate_fn=collate
    )
    return lambda number: loader


def _named(row: tuple[list[Any]]) -> dict[str, Any]:
    return dict(zip(FIELDS, row[0], strict=True))


def _loader(rows: Any, workers: int) -> Iterable[Batch]:
    return torch.utils.data.DataLoader(rows, ROWS_A_BATCH, num_workers=workers, collate_fn=collate)


READERS = {"ours": ours, "datasets": with_datasets, "webdataset": with_webdataset, "litdata": with_litdata}


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of one shard, each a dictionary of arrays."""
    import pyarrow.parquet as pq

    table = pq.read_table(file, columns=list(FIELDS))
    columns = {field: table.column(field).combine_chunks() for field in FIELDS}
    for place in range(len(table)):
        yield {field: columns[field][place].values.to_numpy().copy() for field in FIELDS}


def write(name: str, root: Path) -> None:
    """Writes the records of root/cache in a peer's own format."""
    files = sorted((root / "cache" / "logits").glob("*.parquet"))
    if name == "webdataset":
        import webdataset

        (root / name).mkdir()
        for number, file in enumerate(files):
            with webdataset.TarWriter(str(root / name / f"{number:05}.tar")) as tar:
                for place, row in enumerate(records(file)):
                    tar.write({"__key__": f"{number:05}-{place:05}", "row.ten": list(row.values())})
    if name == "litdata":
        import litdata

        litdata.optimize(records, files, str(root / name), chunk_bytes="64MB", num_workers=1)


class Peak(threading.Thread):
    """The peak memory of this process and its children together, in bytes; sampled in a thread."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        import psutil

        self.most, self._own = 0, psutil.Process()
        self._gone = psutil.Error
        self.sample()
        self.start()

    def run(self) -> None:
        """Sample twenty times a second."""
        while True:
            time.sleep(0.05)
            self.sample()

    def sample(self) -> None:
        """Sample once."""
        held = 0
        for process in (self._own, *self._own.children(recursive=True)):
            try:
                held += process.memory_info().rss
            except self._gone:
                continue
        self.most = max(self.most, held)


def drop_from_page_cache(root: Path) -> None:
    """Drop these files from the page cache."""
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def main() -> None:
    name, root = sys.argv[1], Path(sys.argv[2])
    if sys.argv[3] == "write":
        write(name, root)
        return
    workers, epochs = int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    if "cold" in sys.argv:
        drop_from_page_cache(root)
    peak = Peak()
    before = peak.most
    started = time.perf_counter()
    read = READERS[name](root, workers)
    seconds, targets, checksum, first = [], 0, 0, 0.0
    for number in range(epochs):
        targets = checksum = 0
        for batch in read(number):
            first = first or time.perf_counter() - started
            targets += len(batch[2])
            checksum += int(batch[2].sum()) + int(batch[4].sum())
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    peak.sample()
    found = {"first": first, "seconds": seconds, "targets": targets, "checksum": checksum}
    print(json.dumps(found | {"peak": peak.most - before}))


if __name__ == "__main__":
    main()
