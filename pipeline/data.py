"""Raw dataset -> prepared rows: read, cut, split, name.

A prepared dataset is a directory with two files:
    rows.parquet   row_id, text, label (position in `labels`, -1 for none), split (one of SPLITS, or POOL)
    summary.json   label names, counts of what was kept, cut, dropped or repeated, the content's fingerprint
Tokens are not in it: every teacher and student reads the same rows with a tokenizer of its own.
"""

import hashlib
import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.blocks import SENTENCE_END, cut
from pipeline.config import Dataset, Pool, Split
from pipeline.progress import tracked
from storage.errors import DataError
from storage.spec import content_fingerprint, row_id

SPLITS = ("train", "validation", "test")
POOL = "pool"
NO_LABEL = -1
BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrow": "arrow",
}
MARKUP = re.compile(r"<[^>]+>")


class Raw(NamedTuple):
    """The columns that are needed of a raw dataset, in its order."""

    columns: dict[str, list[Any]]
    class_names: dict[str, list[str]]  # of columns that carry names for their numbers (ClassLabel)


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

    def only(self, *splits: str) -> "Rows":
        """The rows of these splits alone, in order."""
        chosen = self.select(*splits)
        return Rows(
            self.row_ids.take(chosen),
            self.texts.take(chosen),
            self.labels[chosen],
            self.splits[chosen],
            self.label_names,
        )


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

    Raises DataError for a missing path or column, an unknown label, an empty split, or rows without text.
    """
    text_column, label_column = config.columns.text, config.columns.label
    labelled = config.task != "causal-lm"
    needed = [text_column, *([label_column] if labelled else [])]
    needed += [config.split] if isinstance(config.split, str) else []
    raw = _read(name, config, name, config.files, config.where, needed)
    counts: Counter[str] = Counter()
    columns: dict[str, list[Any]] = {"row_id": [], "text": [], "label": [], "split": []}

    def keep(source: str, text: str, label: int, split: str) -> None:
        for column, value in zip(columns.values(), (row_id(source, text), text, label, split), strict=True):
            column.append(value)

    texts = _texts(name, config, raw.columns[text_column], counts)
    labels = [NO_LABEL] * len(raw.columns[text_column])
    if labelled:
        labels = _labels(name, config, raw.columns[label_column], raw.class_names.get(label_column))
    if config.rows is not None:
        texts = sorted(sorted(texts, key=lambda row: row_id(name, row[1]))[: config.rows])
    splits = [
        share(text, config.split) if isinstance(config.split, Split)
        else _named_split(name, raw.columns[config.split], index)
        for index, text in texts
    ]  # fmt: skip
    if config.blocks is None:
        for split, (index, text) in zip(splits, texts, strict=True):
            keep(name, text, labels[index], split)
    else:
        for split, text in cut(zip(splits, (text for _, text in texts), strict=True), config.blocks):
            keep(name, text, NO_LABEL, split)
        counts["repeated blocks"] = len(columns["text"]) - len(set(columns["text"]))
    if config.pool is not None:
        known = {*columns["text"], *(text for _, text in texts)}
        for text in _pool(name, config, config.pool, known, counts):
            keep(f"{name}/{POOL}", text, NO_LABEL, POOL)
    return _write(name, config, columns, counts, len(texts), out)


def share(text: str, split: Split) -> str:
    """The split of a text by a stable hash: the same text has the same split in any dataset, order or run."""
    at = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    if at < split.train:
        return "train"
    return "validation" if at < split.train + split.validation else "test"


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, without markup, white space folded. A plain rule, no parser: . ! ? end one."""
    for sentence in SENTENCE_END.split(MARKUP.sub(" ", text)):
        if folded := " ".join(sentence.split()):
            yield folded


def _folded(text: str) -> str:
    return " ".join(MARKUP.sub(" ", text).split())


def _read(
    name: str, config: Dataset, field: str, files: str, where: dict[str, str | int], needed: list[str]
) -> Raw:
    """The needed columns of the rows that match `where`."""
    import datasets

    root = Path(config.path)
    if not root.exists():
        raise DataError(f"datasets.{name}.path: {root} does not exist (looked in {Path.cwd()}).")
    found = sorted(p for p in root.glob(files) if p.is_file()) if files else [root]
    if not found:
        raise DataError(f"datasets.{field}.files: nothing below {root} matches {files!r}.")
    source, options = _builder(name, config.format, found)
    datasets.disable_progress_bars()
    # A cache of our own: the shared one knows files by path and time, so it can give old content for new.
    with tempfile.TemporaryDirectory() as own:
        try:
            loaded = datasets.load_dataset(source, cache_dir=own, **options)
            parts = [_with_split(part, key) if len(loaded) > 1 else part for key, part in loaded.items()]
            rows = datasets.concatenate_datasets(parts)
        except Exception as error:  # whatever a builder raises, the file is what a person can mend
            raise DataError(f"datasets.{name}: {source} cannot read {found[0]}: {error}") from error
        _require_columns(name, rows.column_names, [*needed, *where])
        chosen = list(dict.fromkeys([*needed, *where]))
        table = rows.select_columns(chosen).with_format("arrow")[:]
        columns = {column: table.column(column).to_pylist() for column in chosen}
    for column, value in where.items():
        kept = [index for index, cell in enumerate(columns[column]) if cell == value]
        columns = {key: [cells[index] for index in kept] for key, cells in columns.items()}
    if not columns[needed[0]]:
        raise DataError(f"datasets.{name}: no row of {found[0]} has {where}.")
    features = rows.features.items()
    return Raw(columns, {key: f.names for key, f in features if isinstance(f, datasets.ClassLabel)})


def _builder(name: str, asked: str, found: list[Path]) -> tuple[str, dict[str, Any]]:
    """What `datasets.load_dataset` is called with: (builder, its options)."""
    first = found[0]
    if first.is_dir():
        return (str(first), {}) if asked == "auto" else (asked, {"data_dir": str(first)})
    builder = BUILDERS.get(first.suffix.lower(), "") if asked == "auto" else asked
    if not builder:
        raise DataError(
            f"datasets.{name}.format: {first} ends in none of {', '.join(BUILDERS)}; name a builder."
        )
    options: dict[str, Any] = {"data_files": [str(path) for path in found]}
    if builder == "csv":  # pandas would read the texts "NA", "null" and "None" as nothing
        separator = "\t" if first.suffix.lower() == ".tsv" else ","
        options |= {"sep": separator, "keep_default_na": False, "na_values": [""]}
    return builder, options


def _with_split(part: Any, key: str) -> Any:
    """Datasets that come in several splits get a column that says which, where they have none."""
    return part if "split" in part.column_names else part.add_column("split", [key] * len(part))


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
            f"datasets.{name}: {len(empty):,} of {len(column):,} rows have no text "
            f"(the first is row {empty[0]}).\n"
            f"Mend them, or write datasets.{name}.empty: drop to leave them out (the summary counts them)."
        )
    return kept


def _labels(name: str, config: Dataset, column: list[Any], class_names: list[str] | None) -> list[int]:
    """Every label as a position in `config.labels`; positions and names are both understood.

    Where all names are whole numbers ("1" to "5"), numbers in the column are names. Where the file names its
    numbers with these same labels, those names count: its order may be another.
    """
    if class_names and set(class_names) == set(config.labels):
        column = [class_names[value] if isinstance(value, int) and value >= 0 else value for value in column]
    known: dict[Any, int] = {label: position for position, label in enumerate(config.labels)}
    if all(re.fullmatch(r"-?\d+", label) for label in config.labels):
        known |= {int(label): position for label, position in list(known.items())}
    else:
        known |= {position: position for position in range(len(config.labels))}
    places = [
        known.get(value) if isinstance(value, str | Real) and not isinstance(value, bool) else None
        for value in column
    ]
    if None in places:
        first = places.index(None)
        raise DataError(
            f"datasets.{name}: label {column[first]!r} is outside the set "
            f"({places.count(None):,} rows are, the first is row {first}).\n"
            f"  found    {sorted({repr(value) for value in column})[:20]}\n"
            f"  expected {list(config.labels)} or their positions 0 to {len(config.labels) - 1}\n"
            f"Mend datasets.{name}.labels, or the data."
        )
    return [place for place in places if place is not None]


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
    raw = _read(name, config, f"{name}.pool", pool.files or config.files, pool.where, [column])
    known = {_folded(text) for text in labelled}
    texts: dict[str, None] = {}
    for value in tracked(f"reading the pool of {name}", raw.columns[column], "texts"):
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


def _write(
    name: str,
    config: Dataset,
    columns: dict[str, list[Any]],
    counts: Counter[str],
    num_documents: int,
    out: Path,
) -> dict[str, Any]:
    rows = Counter(columns["split"])
    if empty := [split for split in SPLITS if not rows[split]]:
        raise DataError(
            f"datasets.{name}: the split {empty[0]!r} is empty (rows: {dict(rows)}).\n"
            f"Give it a share under datasets.{name}.split (a few rows may hash past a small share), or, "
            "where that names a column, rows that say so."
        )
    classes = Counter(zip(columns["split"], columns["label"], strict=True))
    summary: dict[str, Any] = {
        "labels": list(config.labels),
        "rows": {split: rows[split] for split in (*SPLITS, POOL)},
        "rows_per_label": {s: {n: classes[s, i] for i, n in enumerate(config.labels)} for s in SPLITS},
        "left_out_or_repeated": dict(sorted(counts.items())),
        "content": content_fingerprint(columns["row_id"]),
    }
    if config.blocks is not None:
        summary |= {"documents": num_documents, "blocks": sum(rows[split] for split in SPLITS)}
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
