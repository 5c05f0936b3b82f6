"""Blocks lose nothing of a document, have at most the words of the setting, and mix documents on purpose."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.config.datasets import Blocks, Dataset, Split
from pipeline.data.chunking import chunk_documents
from pipeline.data.prepare import prepare_dataset, split_of
from pipeline.data.rows import SPLITS, Rows, load_rows
from storage.errors import DataError
from storage.fingerprints import row_id

SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}
# Each word names its document and its place in it, so that lost, repeated and mixed words are seen.
MARK = re.compile(r"(\d+):(\d+);")
ENDS = st.sampled_from(["", ".", '."', ",", "!", "?)"])
GAPS = st.sampled_from([" ", "  ", "\n", "\n\n", "\t", " \r\n ", "\u3000"])
Documents = list[tuple[str, str]]


@st.composite
def documents(draw: st.DrawFn, most: int = 6) -> Documents:
    """(split, text) of some documents; no word is empty, no white space at the ends."""
    made = []
    for index in range(draw(st.integers(1, most))):
        ends = draw(st.lists(st.tuples(ENDS, GAPS), min_size=1, max_size=40))
        text = "".join(f"{index}:{place};{end}{gap}" for place, (end, gap) in enumerate(ends))
        made.append((draw(st.sampled_from(["train", "test"])), text.strip()))
    return made


def marks(text: str) -> list[tuple[int, int]]:
    """(document, word) of every word."""
    return [(int(document), int(word)) for document, word in MARK.findall(text)]


@given(documents(), st.integers(1, 12))
def test_apart_every_block_is_a_piece_of_one_document_in_its_split(docs: Documents, words: int) -> None:
    found = list(chunk_documents(docs, Blocks(words=words)))
    for split, block in found:
        (document,) = {document for document, _ in marks(block)}
        assert docs[document][0] == split
        assert block in docs[document][1], "as it is, white space between words included"
        assert 1 <= len(block.split()) <= words
    assert [m for _, block in found for m in marks(block)] == [m for _, text in docs for m in marks(text)]


@given(documents(), st.integers(1, 12))
def test_apart_the_pieces_are_the_document_up_to_white_space_at_the_cuts(docs: Documents, words: int) -> None:
    for document in docs:
        left = document[1]
        for _, block in chunk_documents([document], Blocks(words=words)):
            left = left.lstrip()
            assert left.startswith(block)
            left = left[len(block) :]
        assert left == ""


@given(documents(), st.integers(1, 12), st.sampled_from(["\n\n", " ", "", "<eos>", " <eos> "]))
def test_across_nothing_is_lost_and_no_split_sees_another(
    docs: Documents, words: int, separator: str
) -> None:
    blocks = Blocks(words=words, across_documents=True, separator=separator)
    found = list(chunk_documents(docs, blocks))
    for split in ("train", "test"):
        joined = separator.join(text for own, text in docs if own == split)
        left = joined
        for block in (block for own, block in found if own == split):
            assert 1 <= len(marks(block)) <= words
            left = left[left.index(block) + len(block) :]
            assert block in joined
        assert left == ""
        own = [m for name, block in found if name == split for m in marks(block)]
        assert own == marks(joined)


@given(documents(), documents(), st.integers(1, 12), st.booleans())
def test_more_documents_change_nothing_but_the_unfinished_blocks(
    docs: Documents, more: Documents, words: int, across: bool
) -> None:
    blocks = Blocks(words=words, across_documents=across)
    before, after = list(chunk_documents(docs, blocks)), list(chunk_documents([*docs, *more], blocks))
    unfinished = len({split for split, _ in docs}) if across else 0
    finished = before[: len(before) - unfinished]
    assert after[: len(finished)] == finished
    assert len({split for split, _ in before[len(finished) :]}) == unfinished, "one of each split, at the end"


@given(documents(), st.integers(4, 12), st.booleans())
def test_a_full_block_is_three_quarters_full_at_least(docs: Documents, words: int, across: bool) -> None:
    blocks = Blocks(words=words, across_documents=across)
    for document in docs:
        found = [block for _, block in chunk_documents([document], blocks)]
        assert all(len(block.split()) > 3 * words / 4 for block in found[:-1])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a b c d e f g h i", ["a b c d e f g h", "i"]),
        ("a b c d e f g. h i", ["a b c d e f g.", "h i"]),
        ('a b c d e f g!") h i', ['a b c d e f g!")', "h i"]),
        ("a b c d e f g\nh i", ["a b c d e f g", "h i"]),
        ("a b c d e f. g h i", ["a b c d e f. g h", "i"]),
        ("a b c d e f g. h.\ni", ["a b c d e f g. h.", "i"]),
        ("a b c d e f g. h", ["a b c d e f g. h"]),
    ],
    ids=["space", "sentence", "quoted", "line", "too early", "the last one", "fits"],
)
def test_a_piece_ends_with_a_sentence_or_line_of_its_last_quarter(text: str, pieces: list[str]) -> None:
    assert [block for _, block in chunk_documents([("train", text)], Blocks(words=8))] == pieces


def test_across_documents_a_block_ends_with_a_document_of_its_last_quarter() -> None:
    docs = [("train", "a b c"), ("train", "d e f g"), ("train", "h i j")]
    found = chunk_documents(docs, Blocks(words=8, across_documents=True, separator="<eos>"))
    assert [block for _, block in found] == ["a b c<eos>d e f g", "h i j"]


def essay(index: int, words: int) -> str:
    return " ".join(f"{index}:{place};" for place in range(words))


def prepared(root: Path, texts: list[str], **changes: Any) -> tuple[Rows, dict[str, Any]]:
    """The rows and the summary of a dataset of these documents."""
    path = root / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text, "part": "train"}) + "\n" for text in texts))
    entry = {"task": "causal-lm", "path": str(path), "split": SPLIT} | changes
    summary = prepare_dataset("prose", Dataset.model_validate(entry), root / "prepared")
    return load_rows(root / "prepared"), summary


TEXTS = [essay(index, 5 + 3 * index) for index in range(30)]


def test_pieces_have_the_split_of_their_document_and_ids_of_their_own(tmp_path: Path) -> None:
    rows, summary = prepared(tmp_path, TEXTS, blocks={"words": 20})
    of = {index: split_of(text, Split(**SPLIT)) for index, text in enumerate(TEXTS)}
    for text, split in zip(rows.texts.to_pylist(), rows.splits, strict=True):
        assert split == of[marks(text)[0][0]]
    assert rows.row_ids.to_pylist() == [row_id("prose", text) for text in rows.texts.to_pylist()]
    assert set(rows.splits) == set(SPLITS)
    assert summary["documents"] == 30
    assert summary["blocks"] == len(rows.row_ids) == sum(-(-len(text.split()) // 20) for text in TEXTS)
    assert json.loads((tmp_path / "prepared" / "summary.json").read_text()) == summary


def test_documents_that_fit_are_the_rows_that_they_were_without_blocks(tmp_path: Path) -> None:
    whole, before = prepared(tmp_path, TEXTS)
    assert "blocks" not in before
    cut_up, _ = prepared(tmp_path, TEXTS, blocks={"words": 92})
    assert cut_up.row_ids.equals(whole.row_ids)


def test_across_documents_each_split_is_one_text(tmp_path: Path) -> None:
    rows, summary = prepared(tmp_path, TEXTS, blocks={"words": 50, "across_documents": True})
    for split in SPLITS:
        texts = rows.only(split).texts.to_pylist()
        own = [text for text in TEXTS if split_of(text, Split(**SPLIT)) == split]
        assert [m for text in texts for m in marks(text)] == [m for text in own for m in marks(text)]
        assert all("\n\n" in text for text in texts[:1])
    assert summary["documents"] == 30


def test_equal_blocks_are_kept_and_counted_like_equal_rows(tmp_path: Path) -> None:
    licence = "all rights reserved."
    texts = [f"{licence} {essay(index, 4)}" for index in range(30)]
    rows, summary = prepared(tmp_path, [*texts, texts[0]], blocks={"words": 3})
    assert Counter(rows.texts.to_pylist())[licence] == 31
    assert summary["left_out_or_repeated"] == {"empty": 0, "repeated": 1, "repeated blocks": 30 + 2}


def test_rows_counts_documents_before_they_are_cut(tmp_path: Path) -> None:
    rows, summary = prepared(tmp_path, TEXTS, rows=25, blocks={"words": 10})
    assert summary["documents"] == len({marks(text)[0][0] for text in rows.texts.to_pylist()}) == 25


def test_the_pool_leaves_out_documents_that_were_cut(tmp_path: Path) -> None:
    _, summary = prepared(tmp_path, TEXTS, blocks={"words": 10}, pool={})
    assert summary["rows"]["pool"] == 0, "all of its texts are documents of the dataset"


def test_a_split_without_a_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the split 'validation' is empty"):
        prepared(tmp_path, TEXTS, blocks={}, split="part")


def test_blocks_of_rows_with_labels_are_refused() -> None:
    with pytest.raises(ValidationError, match="dataset stay whole"):
        Dataset.model_validate({"path": "a.csv", "labels": ["a", "b"], "blocks": {}})
