"""The columns of a raw dataset, as `datasets` reads them."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.datasets import Dataset, Where
from storage.errors import DataError

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".arrow": "arrow",
}


class Selection(NamedTuple):
    """The part of a raw dataset to read."""

    field: str  # the entry below `datasets` that it belongs to, for messages
    files: str  # a pattern below the dataset's path; empty for the path itself
    where: Where  # values that its rows have in their columns
    needed: Sequence[str]  # columns
    others: bool = False  # whether to read all other columns too


class RawColumns(NamedTuple):
    """Columns of a raw dataset, with rows in their order."""

    columns: dict[str, list[Any]]
    class_names: dict[str, list[str]]  # of columns with names for their numbers (ClassLabel)


def read_raw(name: str, config: Dataset, selection: Selection) -> RawColumns:
    """The selected rows and columns of the dataset `name`. Raises DataError for files that cannot be read, a
    missing column, or no such row.
    """
    root = Path(config.path)
    if not root.exists():
        raise DataError(f"datasets.{name}.path: {root} does not exist (looked in {Path.cwd()}).")
    pattern = selection.files
    found = sorted(path for path in root.glob(pattern) if path.is_file()) if pattern else [root]
    if not found:
        raise DataError(f"datasets.{selection.field}.files: nothing below {root} matches {pattern!r}.")
    raw = _load(name, config, selection, found)
    columns = raw.columns
    for column, value in selection.where.items():
        kept = [index for index, cell in enumerate(columns[column]) if cell == value]
        columns = {key: [cells[index] for index in kept] for key, cells in columns.items()}
    if not columns[selection.needed[0]]:
        raise DataError(f"datasets.{name}: no row of {found[0]} has {selection.where}.")
    return raw._replace(columns=columns)


def _load(name: str, config: Dataset, selection: Selection, files: list[Path]) -> RawColumns:
    """The selected columns of all rows."""
    import datasets

    source, options = _builder(name, config, files)
    datasets.disable_progress_bars()
    needed = [*selection.needed, *selection.where]
    # An empty cache: the shared one identifies files by path and time, so it can return old content.
    with tempfile.TemporaryDirectory() as cache:
        try:
            loaded = datasets.load_dataset(source, cache_dir=cache, **options)
            parts = [_with_split(part, key) if len(loaded) > 1 else part for key, part in loaded.items()]
            rows = datasets.concatenate_datasets(parts)
        except Exception as error:  # builders raise errors of all kinds for a file that they cannot read
            raise DataError(f"datasets.{name}: {source} cannot read {files[0]}: {error}") from error
        _require_columns(name, rows.column_names, needed)
        chosen = rows.column_names if selection.others else list(dict.fromkeys(needed))
        table = rows.select_columns(chosen).with_format("arrow")[:]
        columns = {column: table.column(column).to_pylist() for column in chosen}
    features = {key: getattr(f, "feature", f) for key, f in rows.features.items()}  # of lists: their elements
    names = {key: f.names for key, f in features.items() if isinstance(f, datasets.ClassLabel)}
    return RawColumns(columns, names)


def _builder(name: str, config: Dataset, found: list[Path]) -> tuple[str, dict[str, Any]]:
    """The arguments of `datasets.load_dataset`: (builder, its options)."""
    given, first = config.format, found[0]
    if first.is_dir():
        return (str(first), {}) if given == "auto" else (given, {"data_dir": str(first)})
    ending = first.with_suffix("").suffix if first.suffix.lower() == ".gz" else first.suffix
    builder = BUILDERS.get(ending.lower(), "") if given == "auto" else given
    if not builder:
        raise DataError(
            f"datasets.{name}.format: {first} has none of the endings {', '.join(BUILDERS)}; name a builder."
        )
    options: dict[str, Any] = {"data_files": [str(path) for path in found]}
    if builder == "csv":  # pandas would read the texts "NA", "null" and "None" as nothing
        separator = "\t" if ending.lower() == ".tsv" else ","
        options |= {"sep": separator, "keep_default_na": False, "na_values": [""]}
        options |= {} if config.header else {"header": None}
    return builder, options


def _with_split(part: Any, key: str) -> Any:
    """Add a column `split` to a part of a dataset with several splits, unless it has one."""
    return part if "split" in part.column_names else part.add_column("split", [key] * len(part))


def _require_columns(name: str, found: list[str], needed: list[str]) -> None:
    if missing := [column for column in needed if column not in found]:
        raise DataError(
            f"datasets.{name}: column {missing[0]!r} is missing.\n  found {found}\n"
            f"Name the right ones under datasets.{name}.columns (or where, or split)."
        )
