"""What rows are labelled with: one label a row, several, numbers, or words with one tag each.

The text of a row of words is its words joined by one space, so that whoever reads it can count them again
(tokens.py).
"""

import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.datasets import Dataset, Where
from storage.errors import DataError


def label_positions(
    name: str,
    config: Dataset,
    column: list[Any],
    class_names: list[str] | None,
    rows: Sequence[int] | None = None,
) -> list[int]:
    """Every label as a position in `config.labels`; positions and names are both understood.

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
    places = [
        known.get(value) if isinstance(value, str | Real) and not isinstance(value, bool) else None
        for value in column
    ]
    if None in places:
        first, owners = places.index(None), range(len(column)) if rows is None else rows
        wrong = {row for row, place in zip(owners, places, strict=True) if place is None}
        raise DataError(
            f"datasets.{name}: label {column[first]!r} is outside the set "
            f"({len(wrong):,} rows are, the first is row {owners[first]}).\n"
            f"  found    {sorted({repr(value) for value in column})[:20]}\n"
            f"  expected {list(config.labels)} or their positions 0 to {len(config.labels) - 1}\n"
            f"Mend datasets.{name}.labels, or the data."
        )
    return [place for place in places if place is not None]


def join_words(name: str, column: list[Any]) -> list[str | None]:
    """The words of each row as one text; None for none.

    A row is a list of words, or a text that white space separates. Raises DataError for a word that is empty
    or holds white space.
    """
    texts: list[str | None] = []
    for row, value in enumerate(column):
        words = value.split() if isinstance(value, str) else [] if value is None else value
        if not isinstance(words, list):
            raise DataError(
                f"datasets.{name}: row {row} has {value!r} for words, expected a list of words, or a text.\n"
                f"Mend the row, or datasets.{name}.columns."
            )
        if wrong := [word for word in words if not isinstance(word, str) or word.split() != [word]]:
            raise DataError(
                f"datasets.{name}: row {row} has {wrong[0]!r} for a word, expected text that is not empty "
                "and holds no white space.\nCut it into words with a tag each, or write it otherwise."
            )
        texts.append(" ".join(words) or None)
    return texts


def word_tags(
    name: str, config: Dataset, texts: list[str | None], column: list[Any], class_names: list[str] | None
) -> list[list[int]]:
    """The tags of each row's words as positions in `config.labels`. `texts` are those of `joined`.

    Raises DataError where there is not one for each word, and for a tag outside the set.
    """
    flat: list[Any] = []
    rows: list[int] = []
    for row, (text, value) in enumerate(zip(texts, column, strict=True)):
        num_words, own = len((text or "").split()), [] if value is None else value
        if not isinstance(own, list) or len(own) != num_words:
            found = f"{len(own)} tags" if isinstance(own, list) else f"{own!r} for tags"
            raise DataError(
                f"datasets.{name}: row {row} has {num_words} words and {found}, expected a list of one tag "
                f"for each word.\nMend the row, or datasets.{name}.columns."
            )
        flat += own
        rows += [row] * num_words
    made: list[list[int]] = [[] for _ in texts]
    for row, place in zip(rows, label_positions(name, config, flat, class_names, rows), strict=True):
        made[row].append(place)
    return made


def row_values(
    name: str, config: Dataset, columns: dict[str, list[Any]], class_names: list[str] | None
) -> npt.NDArray[np.float32] | None:
    """What rows of several labels, or of numbers, are labelled with [rows, labels]; None for other tasks.

    For multi-label-classification 1 where a row has the label and 0 where not, of one column with lists of
    labels, of one column a label with 0 and 1, or of what rows with the label have in their columns. For
    regression the numbers, of one column with a number (or a list of them) or of one column each. Raises
    DataError for a label outside the set or that no row has so, and for what is no such number.
    """
    if config.task_spec.labels not in ("set", "numbers"):
        return None
    if isinstance(config.columns.label, dict):
        having = config.columns.label
        return np.stack([_having(name, label, having[label], columns) for label in config.labels], axis=1)
    own_columns = [columns[column] for column in config.label_columns]
    several = config.task_spec.labels == "set"
    if several and isinstance(config.columns.label, str):
        return _present(name, config, own_columns[0], class_names)
    rows = list(zip(*own_columns, strict=True)) if len(own_columns) > 1 else own_columns[0]
    made = np.zeros((len(rows), len(config.labels)), np.float32)
    expected = "0 or 1" if several else "a finite number"
    for row, value in enumerate(rows):
        own = value if isinstance(value, list | tuple) else [value]
        good = len(own) == len(config.labels) and all(isinstance(v, Real) and math.isfinite(v) for v in own)
        if not good or (several and not set(own) <= {0, 1}):
            raise DataError(
                f"datasets.{name}: row {row} has {value!r} for {list(config.labels)}, expected {expected} "
                f"for each.\nMend the row, or datasets.{name}.columns."
            )
        made[row] = own
    return made


def _having(name: str, label: str, values: Where, columns: dict[str, list[Any]]) -> npt.NDArray[np.float32]:
    """1 where a row has these values in these columns, and 0 elsewhere."""
    equal = [[cell == value for cell in columns[column]] for column, value in values.items()]
    has: npt.NDArray[np.bool_] = np.logical_and.reduce(equal)
    if not has.any():
        found = {column: sorted({repr(cell) for cell in columns[column]})[:20] for column in values}
        listed = "; ".join(f"{column}: {', '.join(cells)}" for column, cells in found.items())
        raise DataError(
            f"datasets.{name}.columns.label.{label}: no row has {values}.\n  found {listed}\n"
            "Mend the value: 1 is a number, and '1' is text."
        )
    return has.astype(np.float32)


def _present(
    name: str, config: Dataset, column: list[Any], class_names: list[str] | None
) -> npt.NDArray[np.float32]:
    flat: list[Any] = []
    rows: list[int] = []
    for row, value in enumerate(column):
        if not isinstance(value, list):
            raise DataError(
                f"datasets.{name}: row {row} has {value!r} for labels, expected a list (empty for none).\n"
                f"Mend the row, or list one column of 0 and 1 for each label: datasets.{name}.columns.label."
            )
        flat += value
        rows += [row] * len(value)
    made = np.zeros((len(column), len(config.labels)), np.float32)
    made[rows, label_positions(name, config, flat, class_names, rows)] = 1
    return made
