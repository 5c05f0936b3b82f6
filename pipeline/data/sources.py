"""The columns of a raw dataset, as `datasets` reads them."""

import tempfile
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


class RawColumns(NamedTuple):
    """The columns that are needed of a raw dataset, in its order."""

    columns: dict[str, list[Any]]
    class_names: dict[str, list[str]]  # of columns that carry names for their numbers (ClassLabel)


def read_raw(
    name: str, config: Dataset, field: str, files: str, where: Where, needed: list[str],
    others: bool = False,
) -> RawColumns:  # fmt: skip
    """The needed columns of the rows that match `where`; with `others` all columns, in their order."""
    import datasets

    root = Path(config.path)
    if not root.exists():
        raise DataError(f"datasets.{name}.path: {root} does not exist (looked in {Path.cwd()}).")
    found = sorted(p for p in root.glob(files) if p.is_file()) if files else [root]
    if not found:
        raise DataError(f"datasets.{field}.files: nothing below {root} matches {files!r}.")
    source, options = _builder(name, config, found)
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
        chosen = rows.column_names if others else list(dict.fromkeys([*needed, *where]))
        table = rows.select_columns(chosen).with_format("arrow")[:]
        columns = {column: table.column(column).to_pylist() for column in chosen}
    for column, value in where.items():
        kept = [index for index, cell in enumerate(columns[column]) if cell == value]
        columns = {key: [cells[index] for index in kept] for key, cells in columns.items()}
    if not columns[needed[0]]:
        raise DataError(f"datasets.{name}: no row of {found[0]} has {where}.")
    features = {key: getattr(f, "feature", f) for key, f in rows.features.items()}  # of lists: their elements
    return RawColumns(
        columns, {key: f.names for key, f in features.items() if isinstance(f, datasets.ClassLabel)}
    )


def _builder(name: str, config: Dataset, found: list[Path]) -> tuple[str, dict[str, Any]]:
    """What `datasets.load_dataset` is called with: (builder, its options)."""
    asked, first = config.format, found[0]
    if first.is_dir():
        return (str(first), {}) if asked == "auto" else (asked, {"data_dir": str(first)})
    ending = first.with_suffix("").suffix if first.suffix.lower() == ".gz" else first.suffix
    builder = BUILDERS.get(ending.lower(), "") if asked == "auto" else asked
    if not builder:
        raise DataError(
            f"datasets.{name}.format: {first} ends in none of {', '.join(BUILDERS)}; name a builder."
        )
    options: dict[str, Any] = {"data_files": [str(path) for path in found]}
    if builder == "csv":  # pandas would read the texts "NA", "null" and "None" as nothing
        separator = "\t" if ending.lower() == ".tsv" else ","
        options |= {"sep": separator, "keep_default_na": False, "na_values": [""]}
        options |= {} if config.header else {"header": None}
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
