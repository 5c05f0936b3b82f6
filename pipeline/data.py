"""Raw dataset -> prepared rows: read, cut, split, name.

A prepared dataset is a directory with two files:
    rows.parquet   row_id, text, label (position in `labels`, -1 for none), split (train, validation, test,
    pool)
    summary.json   label names, counts of everything that was kept, dropped or repeated, the content's
    fingerprint
Tokens are not in it: every teacher and student reads the same rows with a tokenizer of its own.
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Dataset, Pool, Split
from pipeline.progress import tracked
from storage.errors import DataError
from storage.spec import content_fingerprint, row_id

SPLITS = ("train", "validation", "test")
POOL = "pool"
NO_LABEL = -1
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text",
            ".arrow": "arrow"}  # fmt: skip
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
MARKUP = re.compile(r"<[^>]+>")


class Rows(NamedTuple):
    """Prepared rows, column by column. N rows."""

    row_ids: pa.StringArray  # N
    texts: pa.StringArray  # N
    labels: npt.NDArray[np.int32]  # N, position in label_names, NO_LABEL for none
    splits: npt.NDArray[np.str_]  # N
    label_names: tuple[str, ...]

    def select(self, *splits: str) -> npt.NDArray[np.int64]:
        """Positions of the rows of these splits, in order."""
        return np.flatnonzero(np.isin(self.splits, splits))


def load_rows(directory: Path) -> Rows:
    """The prepared dataset in `directory`. Raises DataError where it is not one."""
    path, summary = directory / "rows.parquet", directory / "summary.json"
    if not path.is_file() or not summary.is_file():
        raise DataError(
            f"there is no prepared dataset in {directory}.\n"
            f"Make it with `dvc repro prepare@{directory.name}`, or fetch it with `dvc pull {directory}`."
        )
    table = pq.read_table(path).combine_chunks()
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    return Rows(
        columns["row_id"],
        columns["text"],
        columns["label"].to_numpy(),
        np.array(columns["split"].to_pylist(), dtype=np.str_),
        tuple(json.loads(summary.read_text())["labels"]),
    )


def prepare(name: str, config: Dataset, out: Path) -> dict[str, Any]:
    """Read, check, cut and split the dataset `name`; write rows.parquet and summary.json; return the summary.

    Raises DataError for a missing path or column, a label outside the set, an empty split, or rows without
    text.
    """
    raw = _read(name, config.path, config.files, config.format, config.where, name)
    needed = [config.columns.text, config.columns.label] + (
        [config.split] if isinstance(config.split, str) else []
    )
    _require_columns(name, raw.column_names, needed)
    counts: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {"row_id": [], "text": [], "label": [], "split": []}

    def keep(source: str, text: str, label: int, split: str) -> None:
        for column, value in zip(columns.values(), (row_id(source, text), text, label, split), strict=True):
            column.append(value)

    texts = _texts(name, config, raw[config.columns.text], counts)
    labels = _labels(name, config, raw[config.columns.label])
    given = list(raw[config.split]) if isinstance(config.split, str) else []
    for index, text in texts:
        split = (
            share(text, config.split) if isinstance(config.split, Split) else _named_split(name, given, index)
        )
        keep(name, text, labels[index], split)
    if config.pool is not None:
        labelled = set(columns["text"])
        for text in _pool(name, config, config.pool, labelled, counts):
            keep(f"{name}/{POOL}", text, NO_LABEL, POOL)
    return _write(name, config, columns, counts, out)


def share(text: str, split: Split) -> str:
    """The split of a text by a stable hash: the same text has the same split in any dataset, order or run."""
    at = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if at < split.train:
        return "train"
    return "validation" if at < split.train + split.validation else "test"


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, without markup, white space folded. A plain rule, not a parser: . ! ? end one."""
    for sentence in SENTENCE_END.split(MARKUP.sub(" ", text)):
        if folded := " ".join(sentence.split()):
            yield folded


def _read(name: str, path: str, files: str, builder: str, where: dict[str, str | int], field: str) -> Any:
    """A `datasets.Dataset` of the rows that match `where`."""
    import datasets

    root = Path(path)
    if not root.exists():
        raise DataError(f"datasets.{name}.path: {path} does not exist (looked in {Path.cwd()}).")
    found = sorted(p for p in root.glob(files) if p.is_file()) if files else [root]
    if not found:
        raise DataError(f"datasets.{field}.files: nothing below {path} matches {files!r}.")
    if builder == "auto":
        builder = BUILDERS.get(found[0].suffix, "") if found[0].is_file() else str(root)
        if not builder:
            raise DataError(
                f"datasets.{name}.format: {found[0]} ends in none of {', '.join(BUILDERS)}; name a builder."
            )
    datasets.disable_progress_bars()
    try:
        # keep_in_memory and a cache of its own would be slower; the builder's cache is keyed by the files'
        # content
        loaded = (
            datasets.load_dataset(builder)
            if builder == str(root)
            else datasets.load_dataset(builder, data_files=[str(p) for p in found])
        )
    except Exception as error:  # whatever a builder raises, the file is what a person can mend
        raise DataError(f"datasets.{name}: {builder} cannot read {found[0]}: {error}") from error
    parts = [part.add_column("split", [key] * len(part)) if len(loaded) > 1 and "split" not in part.column_names else part
             for key, part in loaded.items()]  # fmt: skip
    rows = datasets.concatenate_datasets(parts)
    _require_columns(name, rows.column_names, list(where))
    for column, value in where.items():
        mask = np.array([cell == value for cell in rows[column]])
        rows = rows.select(np.flatnonzero(mask))
    if not len(rows):
        raise DataError(f"datasets.{name}: no row of {found[0]} has {where}.")
    return rows.with_format(None)


def _require_columns(name: str, found: list[str], needed: list[str]) -> None:
    if missing := [column for column in needed if column not in found]:
        raise DataError(
            f"datasets.{name}: column {missing[0]!r} is missing.\n  found {found}\n"
            f"Name the right ones under datasets.{name}.columns (or where, or split)."
        )


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
            f"datasets.{name}: {len(empty):,} of {len(column):,} rows have no text (the first is row {empty[0]}).\n"
            f"Mend them, or write datasets.{name}.empty: drop to leave them out (they are counted in the summary)."
        )
    return kept


def _labels(name: str, config: Dataset, column: list[Any]) -> list[int]:
    """Every label as a position in `config.labels`; positions and names are both understood."""
    known: dict[Any, int] = {label: position for position, label in enumerate(config.labels)}
    known |= {position: position for position in range(len(config.labels))}
    unknown = Counter(value for value in column if isinstance(value, bool) or value not in known)
    if unknown:
        value, times = unknown.most_common(1)[0]
        raise DataError(
            f"datasets.{name}: label {value!r} is outside the set ({times:,} rows, the first is row "
            f"{list(column).index(value)}).\n  found    {sorted(map(repr, set(column)))[:20]}\n"
            f"  expected {list(config.labels)} or their positions 0 to {len(config.labels) - 1}\n"
            f"Mend datasets.{name}.labels, or the data."
        )
    return [known[value] for value in column]


def _named_split(name: str, column: list[Any], index: int) -> str:
    if column[index] not in SPLITS:
        raise DataError(
            f"datasets.{name}: row {index} has split {column[index]!r}, expected one of {list(SPLITS)}."
        )
    return str(column[index])


def _pool(name: str, config: Dataset, pool: Pool, labelled: set[str], counts: Counter[str]) -> list[str]:
    """The unlabelled texts: distinct, none of them a labelled text, chosen by hash so that order does not
    matter.
    """
    raw = _read(name, config.path, pool.files or config.files, config.format, pool.where, f"{name}.pool")
    _require_columns(name, raw.column_names, [config.columns.text])
    texts: dict[str, None] = {}
    for value in tracked(f"reading the pool of {name}", raw[config.columns.text], "texts"):
        whole = unicodedata.normalize("NFC", str(value or ""))
        for text in sentences(whole) if pool.cut == "sentences" else [whole.strip()]:
            words = len(text.split())
            outside = not pool.words[0] <= words <= pool.words[1]
            counts["pool outside the word limits"] += outside
            counts["pool repeated or labelled"] += not outside and (text in texts or text in labelled)
            if not outside and text not in labelled:
                texts[text] = None
    chosen = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[: pool.rows]
    if pool.rows is not None and len(chosen) < pool.rows:
        raise DataError(
            f"datasets.{name}.pool.rows: found {len(chosen):,} rows, expected {pool.rows:,}.\n"
            "Lower rows, widen words, or write null to take what there is."
        )
    return chosen


def _write(
    name: str, config: Dataset, columns: dict[str, list[Any]], counts: Counter[str], out: Path
) -> dict[str, Any]:
    rows = Counter(columns["split"])
    if empty := [split for split in SPLITS if not rows[split]]:
        raise DataError(
            f"datasets.{name}: the split {empty[0]!r} is empty (rows: {dict(rows)}).\n"
            f"Give it a share under datasets.{name}.split; a few rows may hash past a small share."
        )
    classes = Counter(zip(columns["split"], columns["label"], strict=True))
    summary = {
        "labels": list(config.labels),
        "rows": {split: rows[split] for split in (*SPLITS, POOL)},
        "rows_per_label": {s: {n: classes[s, i] for i, n in enumerate(config.labels)} for s in SPLITS},
        "left_out_or_repeated": dict(sorted(counts.items())),
        "content": content_fingerprint(columns["row_id"]),
    }
    out.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [pa.field("row_id", pa.string()), pa.field("text", pa.string()), pa.field("label", pa.int32()),
         pa.field("split", pa.string())]
    )  # fmt: skip
    pq.write_table(
        pa.table(columns, schema=schema), out / "rows.parquet", compression="zstd", write_page_checksum=True
    )
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary
