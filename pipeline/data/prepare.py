"""Raw dataset -> prepared rows: read, cut, split, name.

A prepared dataset is a directory with two files:
    rows.parquet   row_id, text, label (position in `labels`, -1 for none), split (one of SPLITS, or POOL);
                   for token classification also tags (positions in `labels`, one a word; none in the pool);
                   for several labels or numbers a row values (one for each of `labels`: 1 where a row has the
                   label and 0 where not, or the number; null in the pool); for images pixels instead of text;
                   of an augmented dataset (augment.py) also view, and the split VIEWS
    summary.json   label names, counts of what was kept, cut, dropped or repeated, the content's fingerprint;
                   the task, where it is neither of the two that labels tell apart; the shape of images
Tokens are not in it: every teacher and student reads the same rows with a tokenizer of its own.
"""

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.datasets import Dataset, Pool, Split
from pipeline.data.chunking import SENTENCE_END, chunk_documents
from pipeline.data.images import image_names, read_images
from pipeline.data.labels import RowLabels, join_words, read_labels
from pipeline.data.rows import NO_LABEL, POOL, SPLITS, TEST
from pipeline.data.sources import Selection, read_raw
from pipeline.runtime.files import write_json
from pipeline.runtime.progress import tracked
from storage.errors import DataError
from storage.fingerprints import content_fingerprint, row_id

MARKUP = re.compile(r"<[^>]+>")


class _Columns(NamedTuple):
    """The columns of rows.parquet that every dataset has, and those that only some have."""

    row_id: list[str]
    text: list[str]
    label: list[int]
    split: list[str]
    tags: list[list[int]]

    def add(
        self, source: str, text: str, split: str, label: int = NO_LABEL, tags: Sequence[int] = ()
    ) -> None:
        """Add a row that comes from `source`: a dataset, or its pool."""
        self.row_id.append(row_id(source, text))
        self.text.append(text)
        self.label.append(label)
        self.split.append(split)
        self.tags.append(list(tags))


def prepare_dataset(name: str, config: Dataset, out: Path) -> dict[str, Any]:
    """Read, check, cut and split the dataset `name`; write rows.parquet and summary.json; return the summary.

    Raises DataError for a missing path or column, an unknown label, an empty split, or rows without text.
    """
    content = config.content_column
    needed = [*([content] if content else []), *config.label_columns]
    needed += [config.split] if isinstance(config.split, str) else []
    selection = Selection(name, config.files, config.where, needed, others=content is None)
    raw = read_raw(name, config, selection)
    counts: Counter[str] = Counter()
    images, column = None, raw.columns.get(content or "", [])
    if config.images is not None:
        images = read_images(name, config, raw.columns, needed, counts)
        column = image_names(images, config.images.shape)
    if config.task_spec.inputs == "words":
        column = join_words(name, column)
    texts = _texts(name, config, column, counts)
    labels = read_labels(name, config, raw, column)
    if config.rows is not None:
        texts = sorted(sorted(texts, key=lambda row: row_id(name, row[1]))[: config.rows])
    splits = [
        split_of(text, config.split) if isinstance(config.split, Split)
        else _named_split(name, raw.columns[config.split], index)
        for index, text in texts
    ]  # fmt: skip
    columns = _rows(name, config, texts, splits, labels)
    if config.blocks is not None:
        counts["repeated blocks"] = len(columns.text) - len(set(columns.text))
    if config.pool is not None:
        known = {*columns.text, *(text for _, text in texts)}
        for text in _pool(name, config, config.pool, known, counts):
            columns.add(f"{name}/{POOL}", text, POOL)
    at, own = [index for index, _ in texts], columns._asdict()
    if labels.values is not None:
        own["values"] = [*labels.values[at].tolist(), *[None] * columns.split.count(POOL)]
    if labels.tags is None:
        del own["tags"]
    if images is not None:
        del own["text"]
        own["pixels"] = pa.FixedSizeListArray.from_arrays(images[at].reshape(-1), images.shape[1])
    summary = _summary(name, config, own, counts)
    if config.blocks is not None:
        summary |= {"documents": len(texts), "blocks": sum(summary["rows"][split] for split in SPLITS)}
    if not config.task_spec.inferred:
        summary["task"] = config.task
    if config.images is not None:
        summary["shape"] = list(config.images.shape)
    _write(config, own, summary, out)
    return summary


def _rows(
    name: str, config: Dataset, texts: list[tuple[int, str]], splits: list[str], labels: RowLabels
) -> _Columns:
    """The rows of these texts with their labels, or the blocks that documents are cut into."""
    columns = _Columns([], [], [], [], [])
    if config.blocks is not None:
        documents = zip(splits, (text for _, text in texts), strict=True)
        for split, text in chunk_documents(documents, config.blocks):
            columns.add(name, text, split)
        return columns
    for split, (index, text) in zip(splits, texts, strict=True):
        label = NO_LABEL if labels.classes is None else labels.classes[index]
        columns.add(name, text, split, label, () if labels.tags is None else labels.tags[index])
    return columns


def split_of(text: str, split: Split) -> str:
    """The split of a text by a stable hash: the same text has the same split in any dataset, order or run."""
    at = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if at < split.train:
        return "train"
    return "validation" if at < split.train + split.validation else TEST


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, without markup, white space folded. A plain rule, no parser: . ! ? end one."""
    for sentence in SENTENCE_END.split(MARKUP.sub(" ", text)):
        if folded := " ".join(sentence.split()):
            yield folded


def _folded(text: str) -> str:
    return " ".join(MARKUP.sub(" ", text).split())


def _texts(name: str, config: Dataset, column: list[Any], counts: Counter[str]) -> list[tuple[int, str]]:
    """(position, text) of the rows with text: white space stripped, Unicode in NFC."""
    kept, empty, seen = [], [], set()
    for index, value in enumerate(column):
        text = unicodedata.normalize("NFC", str(value)).strip() if value is not None else ""
        if not text:
            empty.append(index)
            continue
        counts["repeated"] += text in seen
        seen.add(text)
        kept.append((index, text))
    counts["empty"] = len(empty)
    if empty and config.empty == "error":
        raise DataError(
            f"datasets.{name}: {len(empty):,} of {len(column):,} rows have no text "
            f"(the first is row {empty[0]}).\n"
            f"Fix them, or write datasets.{name}.empty: drop to leave them out (the summary counts them)."
        )
    return kept


def _named_split(name: str, column: list[Any], index: int) -> str:
    if column[index] not in SPLITS:
        raise DataError(
            f"datasets.{name}: row {index} has split {column[index]!r}, expected one of {list(SPLITS)}."
        )
    return str(column[index])


def _pool(name: str, config: Dataset, pool: Pool, labelled: set[str], counts: Counter[str]) -> list[str]:
    """The unlabelled texts, chosen by hash so that order does not matter: distinct, none of them labelled.

    A text is held to be a labelled one whatever its markup and white space.
    """
    column = config.columns.text
    raw = read_raw(name, config, Selection(f"{name}.pool", pool.files or config.files, pool.where, [column]))
    known = {_folded(text) for text in labelled}
    texts: dict[str, None] = {}
    found = raw.columns[column]
    if config.task_spec.inputs == "words":
        found = join_words(f"{name}.pool", found)
    for value in tracked(f"reading the pool of {name}", found, "texts"):
        whole = unicodedata.normalize("NFC", str(value or ""))
        for text in sentences(whole) if pool.cut == "sentences" else [whole.strip()]:
            words = len(text.split())
            outside = not pool.words[0] <= words <= pool.words[1]
            counts["pool outside the word limits"] += outside
            if outside:
                continue
            is_labelled = _folded(text) in known
            counts["pool repeated or labelled"] += text in texts or is_labelled
            if not is_labelled:
                texts[text] = None
    chosen = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[: pool.rows]
    if pool.rows is not None and len(chosen) < pool.rows:
        raise DataError(
            f"datasets.{name}.pool.rows: found {len(chosen):,} rows, expected {pool.rows:,}.\n"
            "Lower rows, widen words, or write null to take what there is."
        )
    return chosen


def _summary(
    name: str, config: Dataset, columns: dict[str, list[Any]], counts: Counter[str]
) -> dict[str, Any]:
    """Rows by split and label. Raises DataError where a split is empty."""
    rows = Counter(columns["split"])
    if empty := [split for split in SPLITS if not rows[split]]:
        raise DataError(
            f"datasets.{name}: the split {empty[0]!r} is empty (rows: {dict(rows)}).\n"
            f"Give it a share under datasets.{name}.split (a few rows may hash past a small share), or, "
            "where that names a column, rows that say so."
        )
    labels = _labels_of_rows(config, columns)
    classes = Counter(
        (split, label) for split, own in zip(columns["split"], labels, strict=True) for label in own
    )
    per_label = {s: {n: classes[s, i] for i, n in enumerate(config.labels)} for s in SPLITS}
    return {
        "labels": list(config.labels),
        "rows": {split: rows[split] for split in (*SPLITS, POOL)},
        "words_per_label" if "tags" in columns else "rows_per_label": per_label,
        "left_out_or_repeated": dict(sorted(counts.items())),
        "content": content_fingerprint(columns["row_id"]),
    }


def _labels_of_rows(config: Dataset, columns: dict[str, list[Any]]) -> list[Sequence[int]]:
    """The labels of each row, as positions: one, one a word, or those that it has of several."""
    if "tags" in columns:
        return columns["tags"]
    if config.task_spec.labels == "set":
        return [[i for i, has in enumerate(own or ()) if has] for own in columns["values"]]
    return [[label] for label in columns["label"]]


def _write(config: Dataset, columns: dict[str, Any], summary: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    kinds = {"row_id": pa.string(), "text": pa.string(), "label": pa.int32(), "split": pa.string()}
    kinds |= {"tags": pa.list_(pa.int32()), "values": pa.list_(pa.float32())}
    if config.images is not None:
        kinds["pixels"] = pa.list_(pa.uint8(), math.prod(config.images.shape))
    schema = pa.schema([(column, kinds[column]) for column in columns])
    pq.write_table(
        pa.table(columns, schema=schema), out / "rows.parquet", compression="zstd", write_page_checksum=True
    )
    write_json(summary, out / "summary.json", ensure_ascii=False)
