"""Reads what rows are labelled with: one class a row, several, numbers, or one tag a word.

The text of a row of words is its words joined by one space, so that a reader can count them again
(tokenizer.py).

Shape letters: N rows, K labels of the dataset.
"""

import math
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config.datasets import Dataset, Where
from pipeline.config.tasks import Labels
from pipeline.data.sources import RawColumns
from storage.errors import DataError

Values = npt.NDArray[np.float32]
Texts = list[str | None]


class RowLabels(NamedTuple):
    """What N rows are labelled with: one of the three, or nothing."""

    classes: list[int] | None = None  # N positions in the dataset's labels
    tags: list[list[int]] | None = None  # N lists of positions, one a word
    values: Values | None = None  # N x K: 1 and 0 for labels, or numbers


def read_labels(name: str, config: Dataset, raw: RawColumns, texts: Texts) -> RowLabels:
    """The labels of all raw rows, read as the task has them. `texts` are those whose words have tags.

    Raises DataError for a label that does not fit.
    """
    return LABEL_READERS[config.task_spec.labels](name, config, raw, texts)


def no_labels(name: str, config: Dataset, raw: RawColumns, texts: Texts) -> RowLabels:
    """Rows without labels."""
    return RowLabels()


def row_classes(name: str, config: Dataset, raw: RawColumns, texts: Texts) -> RowLabels:
    """One label a row. Raises DataError for a label outside the set."""
    column = config.label_columns[0]
    return RowLabels(classes=label_positions(name, config, raw.columns[column], raw.class_names.get(column)))


def word_tags(name: str, config: Dataset, raw: RawColumns, texts: Texts) -> RowLabels:
    """One tag for each word of the texts of `join_words`.

    Raises DataError where the tags of a row are not as many as its words, and for a tag outside the set.
    """
    column = config.label_columns[0]
    flat: list[Any] = []
    rows: list[int] = []
    for row, (text, value) in enumerate(zip(texts, raw.columns[column], strict=True)):
        num_words, own = len((text or "").split()), [] if value is None else value
        if not isinstance(own, list) or len(own) != num_words:
            found = f"{len(own)} tags" if isinstance(own, list) else f"{own!r} for tags"
            raise DataError(
                f"datasets.{name}: row {row} has {num_words} words and {found}, expected a list of one tag "
                f"for each word.\nFix the row, or datasets.{name}.columns."
            )
        flat += own
        rows += [row] * num_words
    tags: list[list[int]] = [[] for _ in texts]
    positions = label_positions(name, config, flat, raw.class_names.get(column), rows)
    for row, position in zip(rows, positions, strict=True):
        tags[row].append(position)
    return RowLabels(tags=tags)


def label_sets(name: str, config: Dataset, raw: RawColumns, texts: Texts) -> RowLabels:
    """1 where a row has a label and 0 where not.

    Of one column with lists of labels, of one column a label with 0 and 1, or of the values that rows with
    the label have in their columns. Raises DataError for a label outside the set or that no row has, and for
    a value that is not 0 or 1.
    """
    column = config.columns.label
    if isinstance(column, dict):
        has = [_having(name, label, column[label], raw.columns) for label in config.labels]
        return RowLabels(values=np.stack(has, axis=1))
    if isinstance(column, str):
        return RowLabels(values=_present(name, config, raw.columns[column], raw.class_names.get(column)))
    return RowLabels(values=_numbers(name, config, raw, "0 or 1", lambda own: set(own) <= {0, 1}))


def row_numbers(name: str, config: Dataset, raw: RawColumns, texts: Texts) -> RowLabels:
    """Numbers, of one column with a number (or a list of them) or of a column each.

    Raises DataError for a value that is not a finite number.
    """
    return RowLabels(values=_numbers(name, config, raw, "a finite number", lambda own: True))


LABEL_READERS: dict[Labels, Callable[[str, Dataset, RawColumns, Texts], RowLabels]] = {
    "none": no_labels,
    "class": row_classes,
    "tags": word_tags,
    "set": label_sets,
    "numbers": row_numbers,
}


def join_words(name: str, column: list[Any]) -> Texts:
    """The words of each row as one text; None for none.

    A row is a list of words, or a text that white space separates. Raises DataError for a word that is empty
    or holds white space.
    """
    texts: Texts = []
    for row, value in enumerate(column):
        words = value.split() if isinstance(value, str) else [] if value is None else value
        if not isinstance(words, list):
            raise DataError(
                f"datasets.{name}: row {row} has {value!r} for words, expected a list of words, or a text.\n"
                f"Fix the row, or datasets.{name}.columns."
            )
        if wrong := [word for word in words if not isinstance(word, str) or word.split() != [word]]:
            raise DataError(
                f"datasets.{name}: row {row} has {wrong[0]!r} for a word, expected text that is not empty "
                "and holds no white space.\nCut it into words with a tag each, or write it otherwise."
            )
        texts.append(" ".join(words) or None)
    return texts


def label_positions(
    name: str,
    config: Dataset,
    column: list[Any],
    class_names: list[str] | None,
    rows: Sequence[int] | None = None,
) -> list[int]:
    """Every label as a position in `config.labels`, from names or from positions.

    Where all names are whole numbers ("1" to "5"), numbers in the column are names. Where the file names its
    numbers with these same labels, those names count: its order may be another. `rows` are those that the
    labels belong to; None: one each. Raises DataError for a label outside the set.
    """
    if class_names and set(class_names) == set(config.labels):
        column = [class_names[value] if isinstance(value, int) and value >= 0 else value for value in column]
    known: dict[Any, int] = {label: position for position, label in enumerate(config.labels)}
    if all(re.fullmatch(r"-?\d+", label) for label in config.labels):
        known |= {int(label): position for label, position in list(known.items())}
    else:
        known |= {position: position for position in range(len(config.labels))}
    positions = [
        known.get(value) if isinstance(value, str | Real) and not isinstance(value, bool) else None
        for value in column
    ]
    if None in positions:
        first, owners = positions.index(None), range(len(column)) if rows is None else rows
        wrong = {row for row, position in zip(owners, positions, strict=True) if position is None}
        raise DataError(
            f"datasets.{name}: label {column[first]!r} is outside the set "
            f"({len(wrong):,} rows are, the first is row {owners[first]}).\n"
            f"  found    {sorted({repr(value) for value in column})[:20]}\n"
            f"  expected {list(config.labels)} or their positions 0 to {len(config.labels) - 1}\n"
            f"Fix datasets.{name}.labels, or the data."
        )
    return [position for position in positions if position is not None]


def _numbers(
    name: str,
    config: Dataset,
    raw: RawColumns,
    expected: str,
    fits: Callable[[Sequence[float]], bool],
) -> Values:
    """K finite numbers a row that fit, of one column or of K: [N, K]."""
    columns = [raw.columns[column] for column in config.label_columns]
    rows = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
    numbers_NK = np.zeros((len(rows), len(config.labels)), np.float32)
    for row, value in enumerate(rows):
        own = value if isinstance(value, list | tuple) else [value]
        good = len(own) == len(config.labels) and all(isinstance(v, Real) and math.isfinite(v) for v in own)
        if not good or not fits(own):
            raise DataError(
                f"datasets.{name}: row {row} has {value!r} for {list(config.labels)}, expected {expected} "
                f"for each.\nFix the row, or datasets.{name}.columns."
            )
        numbers_NK[row] = own
    return numbers_NK


def _having(name: str, label: str, values: Where, columns: dict[str, list[Any]]) -> Values:
    """1 where a row has these values in these columns, and 0 elsewhere: [N]."""
    equal = [[cell == value for cell in columns[column]] for column, value in values.items()]
    has_N: npt.NDArray[np.bool_] = np.logical_and.reduce(equal)
    if not has_N.any():
        found = {column: sorted({repr(cell) for cell in columns[column]})[:20] for column in values}
        listed = "; ".join(f"{column}: {', '.join(cells)}" for column, cells in found.items())
        raise DataError(
            f"datasets.{name}.columns.label.{label}: no row has {values}.\n  found {listed}\n"
            "Fix the value: 1 is a number, and '1' is text."
        )
    return has_N.astype(np.float32)


def _present(name: str, config: Dataset, column: list[Any], class_names: list[str] | None) -> Values:
    """1 where a label is in the list of a row, and 0 elsewhere: [N, K]."""
    flat: list[Any] = []
    rows: list[int] = []
    for row, value in enumerate(column):
        if not isinstance(value, list):
            raise DataError(
                f"datasets.{name}: row {row} has {value!r} for labels, expected a list (empty for none).\n"
                f"Fix the row, or list one column of 0 and 1 for each label: datasets.{name}.columns.label."
            )
        flat += value
        rows += [row] * len(value)
    has_NK = np.zeros((len(column), len(config.labels)), np.float32)
    has_NK[rows, label_positions(name, config, flat, class_names, rows)] = 1
    return has_NK
