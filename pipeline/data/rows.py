"""Prepared rows: the content of data/NAME."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.tasks import DEFAULT_TASK, TASKS, TaskSpec, inferred_task
from storage.errors import DataError
from storage.tasks import Task

TEST = "test"  # the split that results are measured on
SPLITS = ("train", "validation", TEST)
POOL = "pool"
VIEWS = "views"
NO_LABEL = -1


class Rows(NamedTuple):
    """Prepared rows, column by column. N rows."""

    row_ids: pa.StringArray  # N
    texts: pa.StringArray  # N
    labels: npt.NDArray[np.int32]  # N, position in label_names, NO_LABEL for none
    splits: npt.NDArray[np.str_]  # N
    label_names: tuple[str, ...]
    task: Task = DEFAULT_TASK
    tags: pa.ListArray | None = None  # N lists of positions in label_names, one a word; token classification
    views: npt.NDArray[np.int32] | None = None  # N, which view of a training row, 0 for rows; augmented data
    values: npt.NDArray[np.float32] | None = None  # N x K; nan for rows without. See prepare.py
    pixels: npt.NDArray[np.uint8] | None = None  # N x numbers of an image; its text is empty
    shape: tuple[int, ...] = ()  # of each image: height, width, channels

    @property
    def task_spec(self) -> TaskSpec:
        """What is special about the task."""
        return TASKS[self.task]

    @property
    def truth(self) -> npt.NDArray[Any]:
        """The labels of rows: a position each (int64), or several numbers (float32)."""
        return self.labels.astype(np.int64) if self.values is None else self.values

    def select(self, *splits: str) -> npt.NDArray[np.int64]:
        """Positions of the rows of these splits, in order."""
        return np.flatnonzero(np.isin(self.splits, splits))

    def only(self, *splits: str) -> "Rows":
        """The rows of these splits alone, in order."""
        return self.take(self.select(*splits))

    def with_views(self, most: int, labelled: bool) -> "Rows":
        """All rows, with the first `most` views of each; views have their row's label, or none."""
        if self.views is None:
            return self
        labels = self.labels if labelled else np.where(self.views > 0, np.int32(NO_LABEL), self.labels)
        return self._replace(labels=labels).take(np.flatnonzero(self.views <= most))

    def take(self, chosen: npt.NDArray[np.int64]) -> "Rows":
        """These rows, in this order."""
        return self._replace(
            row_ids=self.row_ids.take(chosen),
            texts=self.texts.take(chosen),
            labels=self.labels[chosen],
            splits=self.splits[chosen],
            tags=None if self.tags is None else self.tags.take(chosen),
            views=None if self.views is None else self.views[chosen],
            values=None if self.values is None else self.values[chosen],
            pixels=None if self.pixels is None else self.pixels[chosen],
        )


def load_rows(directory: Path) -> Rows:
    """The prepared dataset in `directory`. Raises DataError for another directory."""
    path, summary = directory / "rows.parquet", directory / "summary.json"
    if not path.is_file() or not summary.is_file():
        raise DataError(
            f"there is no prepared dataset in {directory}.\n"
            f"Make it with `dvc repro prepare@{directory.name}`, or fetch it with `dvc pull {directory}`."
        )
    table = pq.read_table(path).combine_chunks()
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    about = json.loads(summary.read_text())
    return Rows(
        columns["row_id"],
        columns["text"] if "text" in columns else pa.array([""] * len(table), pa.string()),
        columns["label"].to_numpy(),
        np.array(columns["split"].to_pylist(), dtype=np.str_),
        tuple(about["labels"]),
        about.get("task") or inferred_task(has_labels=bool(about["labels"])),
        columns.get("tags"),
        columns["view"].to_numpy() if "view" in columns else None,
        _matrix(columns.get("values"), len(about["labels"])),
        _matrix(columns.get("pixels"), math.prod(about.get("shape", ()))),
        tuple(about.get("shape", ())),
    )


def _matrix(column: pa.Array | None, width: int) -> npt.NDArray[Any] | None:
    """Lists of `width` numbers each as a matrix; rows without a list are nan."""
    if column is None:
        return None
    flat: npt.NDArray[Any] = column.flatten().to_numpy()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    if there.all():
        return flat.reshape(-1, width)
    rows = np.full((len(column), width), np.nan, np.float32)
    rows[there] = flat.reshape(-1, width)
    return rows
