"""Raw files of any shape -> rows with ids, labels and splits that stay what they are when the data grows."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.datasets import Dataset, Split
from pipeline.data.prepare import prepare_dataset, split_of
from pipeline.data.rows import NO_LABEL, POOL, SPLITS, Rows, load_rows
from storage.errors import DataError
from storage.fingerprints import row_id
from tests import toy

TEXTS = toy.texts(60)
LABELS = [toy.label(text) for text in TEXTS]
NAMES = ("negative", "positive")
SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}


def config(path: Path, /, **changes: Any) -> Dataset:
    return Dataset.model_validate({"path": str(path), "labels": list(NAMES), "split": SPLIT} | changes)


def prepared(path: Path, /, **changes: Any) -> Rows:
    """The rows of the dataset at `path`; what is made lies beside it."""
    out = path.parent / "prepared"
    prepare_dataset("toy", config(path, **changes), out)
    return load_rows(out)


def refusal(path: Path, /, **changes: Any) -> str:
    with pytest.raises(DataError) as refused:
        prepared(path, **changes)
    return str(refused.value)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as the ending of `path` says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def rows(**extra: list[Any]) -> list[dict[str, Any]]:
    columns = {"text": TEXTS, "label": LABELS} | extra
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "CSV"])
def test_any_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    found = prepared(write(tmp_path / f"a.{ending}", rows()))
    assert found.texts.to_pylist() == TEXTS
    assert found.labels.tolist() == LABELS
    assert found.row_ids.to_pylist() == [row_id("toy", text) for text in TEXTS]
    assert set(found.splits) == set(SPLITS)


def test_commas_in_a_tsv_are_part_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", rows(text=[f"well, {text}" for text in TEXTS]))
    assert prepared(path).texts[0].as_py() == f"well, {TEXTS[0]}"


@pytest.mark.parametrize(
    "values",
    [
        [NAMES[label] for label in LABELS],
        LABELS,
        [float(label) for label in LABELS],
    ],
    ids=["names", "ints", "floats"],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_labels_may_be_names_or_positions_of_any_number_type(
    tmp_path: Path, values: list[Any], ending: str
) -> None:
    assert prepared(write(tmp_path / f"a.{ending}", rows(label=values))).labels.tolist() == LABELS


def test_labels_that_are_named_by_numbers_are_names_and_not_positions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", rows(label=[1 - label for label in LABELS]))
    assert prepared(path, labels=["1", "0"]).labels.tolist() == LABELS
    stars = write(tmp_path / "b.csv", rows(label=[label + 1 for label in LABELS]))
    assert prepared(stars, labels=["1", "2"]).labels.tolist() == LABELS


def test_class_names_that_the_file_brings_count_more_than_its_numbers(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=list(reversed(NAMES)))
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    columns = {"text": TEXTS, "label": [1 - label for label in LABELS]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    assert prepared(tmp_path / "a.parquet").labels.tolist() == LABELS


@pytest.mark.parametrize("bad", [None, "neutral", 2, -1, 0.5, True, [1]])
def test_a_label_outside_the_set_is_refused_with_its_row(tmp_path: Path, bad: object) -> None:
    if isinstance(bad, bool | list):  # a column has one type
        values: list[Any] = [bad] * len(LABELS)
        first = 0
    elif isinstance(bad, str):
        values, first = [NAMES[label] for label in LABELS], 7
    else:
        values, first = [None if bad is None else type(bad)(label) for label in LABELS], 7
        values = list(LABELS) if bad is None else values
    values[first] = bad
    message = refusal(write(tmp_path / "a.parquet", rows(label=values)))
    assert f"label {bad!r} is outside the set" in message
    assert f"the first is row {first}" in message
    assert "negative" in message


def test_where_keeps_rows_by_words_and_by_numbers(tmp_path: Path) -> None:
    extra: dict[str, list[Any]] = {"year": [2000 + i % 2 for i in range(60)], "kind": ["a", "b", "c"] * 20}
    path = write(tmp_path / "a.csv", rows(**extra))
    found = prepared(path, where={"year": 2001, "kind": "b"})
    assert found.texts.to_pylist() == [t for i, t in enumerate(TEXTS) if i % 2 == 1 and i % 3 == 1]
    assert "no row of" in refusal(path, where={"year": 1999})


def test_a_split_column_is_taken_at_its_word(tmp_path: Path) -> None:
    given = (["train"] * 4 + ["validation", "test"]) * 10
    path = write(tmp_path / "a.csv", rows(part=given))
    assert prepared(path, split="part").splits.tolist() == given
    given[5] = "dev"
    message = refusal(write(tmp_path / "b.csv", rows(part=given)), split="part")
    assert "row 5 has split 'dev'" in message


def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "raw" / "deep").mkdir(parents=True)
    write(tmp_path / "raw" / "b.csv", rows()[30:])
    write(tmp_path / "raw" / "a.csv", rows()[:30])
    (tmp_path / "raw" / "README.md").write_text("not data")
    assert prepared(tmp_path / "raw", files="*.csv").texts.to_pylist() == TEXTS
    assert prepared(tmp_path / "raw", files="**/*.csv").texts.to_pylist() == TEXTS
    assert "nothing below" in refusal(tmp_path / "raw", files="*.parquet")


@pytest.mark.parametrize("builder", ["auto", "csv"])
def test_a_directory_with_splits_gets_a_column_that_names_them(tmp_path: Path, builder: str) -> None:
    (tmp_path / "raw").mkdir()
    for name, part in (("train", rows()[:40]), ("validation", rows()[40:50]), ("test", rows()[50:])):
        write(tmp_path / "raw" / f"{name}.csv", part)
    found = prepared(tmp_path / "raw", split="split", format=builder)
    assert sorted(found.texts.to_pylist()) == sorted(TEXTS)
    assert found.texts.take(pa.array(found.select("test"))).to_pylist() == TEXTS[50:]
    only = prepared(tmp_path / "raw", where={"split": "train"}, format=builder)
    assert only.texts.to_pylist() == TEXTS[:40]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere.csv"}, "does not exist"),
        ({"columns": {"text": "body"}}, "column 'body' is missing"),
        ({"columns": {"label": "stars"}}, "column 'stars' is missing"),
        ({"where": {"lang": "en"}}, "column 'lang' is missing"),
        ({"split": "part"}, "column 'part' is missing"),
        ({"pool": {"where": {"lang": "en"}}}, "column 'lang' is missing"),
        ({"format": "parquet"}, "parquet cannot read"),
        ({"pool": {"rows": 1000}}, "found 0 rows, expected 1,000"),
        ({"split": {"train": 1.0, "validation": 0.0, "test": 0.0}}, "the split 'validation' is empty"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "a.csv", rows())
    assert message in refusal(path, **changes)
    assert not (tmp_path / "prepared" / "rows.parquet").exists()


def test_a_file_of_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    assert ".csv" in refusal(tmp_path / "a.xlsx")


def test_rows_without_text_are_an_error_or_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(text=[None, "  \n", *TEXTS[2:]]))
    assert "2 of 60 rows have no text (the first is row 0)" in refusal(path)
    summary = prepare_dataset("toy", config(path, empty="drop"), tmp_path / "out")
    assert summary["left_out_or_repeated"]["empty"] == 2
    found = load_rows(tmp_path / "out")
    assert found.texts.to_pylist() == TEXTS[2:]
    assert found.labels.tolist() == LABELS[2:]


@pytest.mark.parametrize("word", ["NA", "null", "None", "nan"])
def test_a_text_that_says_na_is_a_text(tmp_path: Path, word: str) -> None:
    found = prepared(write(tmp_path / "a.csv", rows(text=[word, *TEXTS[1:]])))
    assert found.texts[0].as_py() == word


def test_equal_texts_share_split_and_id_however_they_are_written(tmp_path: Path) -> None:
    accented = ["caf\u00e9 noir", " cafe\u0301 noir ", "caf\u00e9 noir\n"] * 3
    path = write(tmp_path / "a.jsonl", rows(text=[*accented, *TEXTS[9:]]))
    found = prepared(path)
    assert len(set(found.splits[:9])) == len(set(found.row_ids.to_pylist()[:9])) == 1
    assert json.loads((tmp_path / "prepared" / "summary.json").read_text())["left_out_or_repeated"] == {
        "empty": 0,
        "repeated": 8,
    }


def test_appended_rows_leave_ids_and_splits_of_the_others_as_they_were(tmp_path: Path) -> None:
    before = prepared(write(tmp_path / "a.csv", rows()[:50]))
    after = prepared(write(tmp_path / "a.csv", rows()))
    assert after.row_ids.to_pylist()[:50] == before.row_ids.to_pylist()
    assert after.splits[:50].tolist() == before.splits.tolist()


def test_new_content_is_read_although_path_and_time_are_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", rows())
    os.utime(path, (1_000_000_000, 1_000_000_000))
    prepared(path)
    write(path, rows(text=[text + " indeed" for text in TEXTS]))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    assert prepared(path).texts[0].as_py() == TEXTS[0] + " indeed"


def test_shares_are_kept_to_within_chance() -> None:
    split = Split(train=0.7, validation=0.2, test=0.1)
    found = [split_of(f"text {i}", split) for i in range(5000)]
    assert found.count("train") / 5000 == pytest.approx(0.7, abs=0.03)
    assert found.count("test") / 5000 == pytest.approx(0.1, abs=0.02)


def test_the_pool_leaves_out_labelled_texts_and_does_not_care_for_order(tmp_path: Path) -> None:
    extra = toy.texts(40, seed=1)
    pool = [*extra, TEXTS[0], f"<b>{TEXTS[1]}</b>", TEXTS[2].replace(" ", "  "), extra[0]]
    found = []
    for part in (pool, pool[::-1]):
        mixed = rows(source=["l"] * 60) + [{"text": t, "label": 0, "source": "p"} for t in part]
        path = write(tmp_path / "a.csv", mixed)
        made = prepared(path, where={"source": "l"}, pool={"where": {"source": "p"}, "rows": 30})
        texts = made.texts.take(pa.array(made.select(POOL))).to_pylist()
        assert not {" ".join(text.split()) for text in texts} & {*TEXTS, f"<b>{TEXTS[1]}</b>"}
        assert (made.labels[made.select(POOL)] == NO_LABEL).all()
        found.append(texts)
    assert found[0] == found[1]
    assert len(found[0]) == len(set(found[0])) == 30


def test_the_pool_can_be_cut_into_sentences_within_word_limits(tmp_path: Path) -> None:
    text = 'One two three.<br />Four "five" six! Seven. Eight nine ten eleven twelve'
    mixed = [*rows(source=["l"] * 60), {"text": text, "label": 0, "source": "p"}]
    path = write(tmp_path / "a.csv", mixed)
    pool = {"where": {"source": "p"}, "cut": "sentences", "words": [2, 4]}
    found = prepared(path, where={"source": "l"}, pool=pool)
    texts = found.texts.take(pa.array(found.select(POOL))).to_pylist()
    assert sorted(texts) == ['Four "five" six!', "One two three."]


def test_a_directory_that_holds_no_prepared_dataset_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dvc repro prepare@nothing"):
        load_rows(tmp_path / "nothing")
