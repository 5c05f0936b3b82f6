"""Words with a tag each, from raw files to prepared rows; a row that cannot be is refused by its number."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.datasets import Dataset
from pipeline.data.prepare import prepare_dataset
from pipeline.data.rows import NO_LABEL, POOL, Rows, load_rows
from storage.errors import DataError
from storage.fingerprints import row_id
from tests import toy
from tests.pipeline.encoders import SPLIT, TAGS, tags

TEXTS = toy.texts(60)
WORDS = [text.split() for text in TEXTS]
GIVEN = [tags(text) for text in TEXTS]
PLACES = [[TAGS.index(tag) for tag in own] for own in GIVEN]


def prepared(path: Path, /, **changes: Any) -> Rows:
    """The rows of the dataset at `path`; what is made lies beside it."""
    entry = {"task": "token-classification", "path": str(path), "labels": list(TAGS), "split": SPLIT}
    entry["columns"] = {"text": "tokens", "label": "ner_tags"}
    prepare_dataset("toy", Dataset.model_validate(entry | changes), path.parent / "prepared")
    return load_rows(path.parent / "prepared")


def write(root: Path, words: list[Any] = WORDS, given: list[Any] = GIVEN, **more: list[Any]) -> Path:
    columns = {"tokens": words, "ner_tags": given} | more
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "a.jsonl"


def changed(values: list[Any], row: int, value: Any) -> list[Any]:
    return [value if place == row else own for place, own in enumerate(values)]


def test_words_are_joined_by_one_space_and_tags_are_positions(tmp_path: Path) -> None:
    found = prepared(write(tmp_path))
    assert found.task == "token-classification"
    assert found.texts.to_pylist() == TEXTS
    assert found.row_ids.to_pylist() == [row_id("toy", text) for text in TEXTS]
    assert found.tags is not None
    assert found.tags.to_pylist() == PLACES
    assert (found.labels == NO_LABEL).all()
    only = found.only("test")
    assert only.tags is not None
    assert only.tags.to_pylist() == [PLACES[i] for i in found.select("test")]


@pytest.mark.parametrize(
    "texts", [TEXTS, [f" {text} ".replace(" ", " \t") for text in TEXTS]], ids=["plain", "wild"]
)
def test_a_text_is_cut_into_words_by_white_space(tmp_path: Path, texts: list[str]) -> None:
    found = prepared(write(tmp_path, texts))
    assert found.texts.to_pylist() == TEXTS
    assert found.tags is not None
    assert found.tags.to_pylist() == PLACES


def test_tags_may_be_positions(tmp_path: Path) -> None:
    found = prepared(write(tmp_path, given=PLACES))
    assert found.tags is not None
    assert found.tags.to_pylist() == PLACES


def test_names_that_the_file_brings_count_more_than_its_numbers(tmp_path: Path) -> None:
    names = datasets.List(datasets.ClassLabel(names=list(TAGS[::-1])))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": names})
    columns = {"tokens": WORDS, "ner_tags": [[2 - place for place in own] for own in PLACES]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    found = prepared(tmp_path / "a.parquet")
    assert found.tags is not None
    assert found.tags.to_pylist() == PLACES


@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (WORDS, changed(GIVEN, 7, GIVEN[7][:-1]), r"row 7 has \d+ words and \d+ tags"),
        (WORDS, changed(GIVEN, 7, [*GIVEN[7], "O"]), r"row 7 has \d+ words and \d+ tags"),
        (WORDS, changed(GIVEN, 7, None), r"row 7 has \d+ words and 0 tags"),
        (WORDS, [" ".join(own) for own in GIVEN], r"row 0 has \d+ words and 'O.*' for tags"),
        (WORDS, ["O" * len(own) for own in GIVEN], r"row 0 has \d+ words and 'OO+' for tags"),
        (WORDS, changed(GIVEN, 7, ["?", *GIVEN[7][1:-1], "?"]), r"label .\?. is outside the set \(1 rows "
         r"are, the first is row 7\)"),
        (changed(WORDS, 7, ["New York", *WORDS[7][1:]]), GIVEN, "row 7 has 'New York' for a word"),
        (changed(WORDS, 7, ["New\u00a0York", *WORDS[7][1:]]), GIVEN, "row 7 has 'New\\\\xa0York' for a word"),
        (changed(WORDS, 7, ["", *WORDS[7][1:]]), GIVEN, "row 7 has '' for a word"),
        ([3] * 60, [["O"]] * 60, "row 0 has 3 for words"),
        (changed(WORDS, 7, []), changed(GIVEN, 7, []), r"1 of 60 rows have no text \(the first is row 7\)"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_is_refused_with_its_number(
    tmp_path: Path, words: list[Any], given: list[Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        prepared(write(tmp_path, words, given))


def test_rows_without_words_are_dropped_with_their_tags(tmp_path: Path) -> None:
    found = prepared(write(tmp_path, changed(WORDS, 7, None), changed(GIVEN, 7, None)), empty="drop")
    assert found.texts.to_pylist() == TEXTS[:7] + TEXTS[8:]
    assert found.tags is not None
    assert found.tags.to_pylist() == PLACES[:7] + PLACES[8:]


def test_a_pool_of_words_has_no_tags(tmp_path: Path) -> None:
    kinds = ["l"] * 50 + ["p"] * 10
    pool = {"where": {"kind": "p"}}
    found = prepared(write(tmp_path, kind=kinds), where={"kind": "l"}, pool=pool)
    chosen = found.select(POOL)
    assert sorted(found.texts.take(pa.array(chosen)).to_pylist()) == sorted(TEXTS[50:])
    assert found.tags is not None
    assert found.tags.take(pa.array(chosen)).to_pylist() == [[]] * 10


def test_the_summary_counts_words_and_names_the_task(tmp_path: Path) -> None:
    found = prepared(write(tmp_path))
    summary = json.loads((tmp_path / "prepared" / "summary.json").read_text())
    assert summary["task"] == "token-classification"
    train = [place for row in found.select("train") for place in PLACES[row]]
    assert summary["words_per_label"]["train"] == {name: train.count(i) for i, name in enumerate(TAGS)}
    assert "rows_per_label" not in summary


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_documents_need_no_label_and_keep_their_task(tmp_path: Path, task: str) -> None:
    found = prepared(write(tmp_path, TEXTS), task=task, labels=[])
    assert (found.task, found.label_names, found.tags) == (task, (), None)
    assert pq.read_schema(tmp_path / "prepared" / "rows.parquet").names == [
        "row_id",
        "text",
        "label",
        "split",
    ]
