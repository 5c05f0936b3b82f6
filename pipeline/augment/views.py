"""The augment stage: a prepared dataset -> its rows, and views of its training rows as more rows.

A view is a text with some words replaced, left out (Tang et al. 2019; Jiao et al. 2020, TinyBERT), or moved
(Wei and Zou 2019, EDA). It is a function of (seed, the row's text, the view's number) and of the model that
words come from: other rows and their order do not change it. The original rows keep their ids, so a cache of
the dataset has their targets already, and only the views are captured.

The output has the files of pipeline/data/prepare.py, with one more column `view`: the view's number from 1; 0
for original rows. Views are a split of their own, and have the label of their row: the recipe decides whether
to use it, since a text that lost a "not" may have another one. A view with the same text as its row, as an
earlier view of it, or as a row of validation or test is left out, and counted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.augment.substitutes import Masked, Neighbours, Request, Substitutes, core, with_core
from pipeline.config.datasets import Augmented
from pipeline.config.tasks import tasks_with
from pipeline.data import counter_rng
from pipeline.data.rows import VIEWS, Rows, load_rows
from pipeline.engines.model_files import teacher_identity
from pipeline.runtime.files import write_json
from pipeline.runtime.progress import log
from storage.errors import AssetError, DataError
from storage.fingerprints import content_fingerprint, row_id

Uniforms = npt.NDArray[np.float64]

DRAWS = 4  # of a word: replaced or left out, its substitute, whether it moves, and where to


def augment_dataset(name: str, entry: Augmented, dataset: Path, out: Path) -> dict[str, Any]:
    """Write the rows of `dataset` and their views into the directory `out`; return the summary.

    Raises DataError for a dataset of another task, AssetError or TeacherError where the model has no words to
    offer.
    """
    rows = load_rows(dataset)
    if rows.task_spec.inputs != "text" or rows.task_spec.labels != "class":
        known = tasks_with(inputs="text", labels="class")
        raise DataError(
            f"augmented.{name}: views are made of rows with one label each, and the task of "
            f"{entry.dataset} is {rows.task}.\nName a dataset of the task {known}."
        )
    substitutes = None
    if entry.replace:
        if not (Path(entry.model) / "config.json").is_file():
            raise AssetError(
                f"augmented.{name}.model: {entry.model} is not a directory with a config.json.\n"
                "Name a model's directory; add one of a hub to assets and write assets/NAME."
            )
        kind = Neighbours if entry.words == "embeddings" else Masked
        substitutes = kind(Path(entry.model), entry.candidates)
    train = rows.select("train")
    texts = rows.texts.take(train).to_pylist()
    views = [make_views(texts, entry, number, substitutes) for number in range(1, entry.views + 1)]
    table, counts = _added(entry, dataset, rows, texts, views)
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, out / "rows.parquet", compression="zstd", write_page_checksum=True)
    kept = Counter(table.column("view").to_pylist())
    summary: dict[str, Any] = json.loads((dataset / "summary.json").read_text())
    summary["rows"][VIEWS] = sum(kept[number] for number in range(1, entry.views + 1))
    summary |= {
        "content": content_fingerprint(table.column("row_id").to_pylist()),
        "views": {str(number): kept[number] for number in range(1, entry.views + 1)},
        "views_left_out": dict(sorted(counts.items())),
        "words_from": teacher_identity(Path(entry.model)).model_dump() if entry.replace else None,
    }
    write_json(summary, out / "summary.json", ensure_ascii=False)
    log(f"{name}: {summary['rows'][VIEWS]:,} views of {len(texts):,} training rows")
    return summary


def make_views(
    texts: Sequence[str], entry: Augmented, number: int, substitutes: Substitutes | None
) -> list[str]:
    """View `number` of each text, its words joined by single spaces.

    `substitutes` may be None where nothing is replaced.
    """
    words = [text.split() for text in texts]
    chances = [_draws(text, len(own), entry.seed, number) for text, own in zip(texts, words, strict=True)]
    if substitutes is not None:
        requests = [
            Request(own, [p for p in np.flatnonzero(u[:, 0] < entry.replace).tolist() if core(own[p])])
            for own, u in zip(words, chances, strict=True)
        ]
        for request, u, found in zip(requests, chances, substitutes(requests), strict=True):
            for place, others in zip(request.places, found, strict=True):
                if others:
                    request.words[place] = _as(request.words[place], others[int(u[place, 1] * len(others))])
    return [_moved(own, u, entry) for own, u in zip(words, chances, strict=True)]


def _draws(text: str, num_words: int, seed: int, number: int) -> Uniforms:
    """[words, DRAWS] random numbers in [0, 1) of this view of this text."""
    rows = counter_rng.row_words([hashlib.sha256(text.encode()).hexdigest()])
    return counter_rng.uniforms(seed, rows.repeat(num_words, 0), np.arange(num_words), DRAWS, stream=number)


def _moved(words: list[str], u: Uniforms, entry: Augmented) -> str:
    """The text without its left-out words, after some words have changed places."""
    gone = (u[:, 0] >= entry.replace) & (u[:, 0] < entry.replace + entry.delete)
    left = np.flatnonzero(~gone) if not gone.all() else np.array([u[:, 1].argmin()])
    kept = [words[place] for place in left]
    for here, place in enumerate(left):
        if u[place, 2] < entry.swap:
            there = int(u[place, 3] * len(kept))
            kept[here], kept[there] = kept[there], kept[here]
    return " ".join(kept)


def _as(word: str, other: str) -> str:
    """Another word in place of this one: with its punctuation and its capital."""
    capital = core(word)[:1].isupper()
    return with_core(word, other[:1].upper() + other[1:] if capital else other)


def _added(
    entry: Augmented, dataset: Path, rows: Rows, texts: list[str], views: list[list[str]]
) -> tuple[pa.Table, Counter[str]]:
    """(the rows followed by their views, numbers of left-out views by reason)."""
    train = rows.select("train")
    held_out = {_folded(text) for text in rows.texts.take(rows.select("validation", "test")).to_pylist()}
    known = [{_folded(text)} for text in texts]
    counts = Counter({"says what its row or an earlier view says": 0, "says what a held-out row says": 0})
    chosen: list[int] = []  # rows of the dataset
    numbers: list[int] = []
    kept: list[str] = []
    for number, own in enumerate(views, 1):
        for place, text in enumerate(own):
            if _folded(text) in held_out:
                counts["says what a held-out row says"] += 1
            elif _folded(text) in known[place]:
                counts["says what its row or an earlier view says"] += 1
            else:
                known[place].add(_folded(text))
                chosen.append(int(train[place]))
                numbers.append(number)
                kept.append(text)
    before = pq.read_table(dataset / "rows.parquet")
    added = {
        "row_id": [row_id(f"{entry.dataset}/{VIEWS}", text) for text in kept],
        "text": kept,
        "label": rows.labels[chosen],
        "split": [VIEWS] * len(kept),
    }
    both = pa.concat_tables([before, pa.table(added, schema=before.schema)])
    column = pa.array([0] * len(before) + numbers, pa.int32())
    return both.append_column("view", column), counts


def _folded(text: str) -> str:
    return " ".join(text.split())
