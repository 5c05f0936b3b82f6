"""The ids are those of transformers' tokenizers; what is cut is cut as they cut it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from pipeline.data.tokenizer import NO_WORD, TextReader, Tokens
from storage.errors import AssetError, DataError
from tests import toy
from tests.pipeline import decoder, encoders

TEXTS = [*toy.texts(20), "good [SEP] film", "words that nobody knows", "Good FILM!", "good"]


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert") / "model"
    toy.write_model(directory)
    return directory


@pytest.fixture(scope="module")
def decoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt") / "model"
    decoder.write(directory)
    return directory


@pytest.mark.parametrize("which", ["encoder_dir", "decoder_dir"])
@pytest.mark.parametrize("max_length", [64, 5, 3])
def test_the_ids_are_those_of_auto_tokenizer_whole_and_cut(
    which: str, max_length: int, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(which)
    auto = AutoTokenizer.from_pretrained(directory)
    expected = [auto(text, truncation=True, max_length=max_length)["input_ids"] for text in TEXTS]
    found = TextReader(directory, max_length, "truncate").read(TEXTS, TEXTS)
    assert [found.row(i).tolist() for i in range(len(TEXTS))] == expected
    whole = [len(auto(text)["input_ids"]) for text in TEXTS]
    assert found.num_cut == sum(length > max_length for length in whole)


def test_rows_that_are_too_long_are_refused_with_the_longest_and_the_count(encoder_dir: Path) -> None:
    texts = ["good film", "good " * 30, "bad " * 40]
    with pytest.raises(DataError) as refused:
        TextReader(encoder_dir, 16, "error").read(texts, ["first", "second", "third"])
    assert "2 of 3 rows are longer than max_length 16" in str(refused.value)
    assert "the longest has 42: row third" in str(refused.value)
    assert "too_long: truncate" in str(refused.value)


def test_a_text_of_no_tokens_is_one_token_so_that_no_row_is_empty(decoder_dir: Path) -> None:
    reader = TextReader(decoder_dir, 8, "error")
    found = reader.read(["", "good"], ["a", "b"])
    assert found.lengths.min() == 1
    assert found.row(0).tolist() == [reader.pad_id]


def test_a_tokenizer_without_padding_pads_with_the_end_of_text_and_never_with_a_letter(
    decoder_dir: Path,
) -> None:
    reader = TextReader(decoder_dir, 8, "error")
    assert reader.pad_id == reader.special["eos_token"] != 0
    assert reader.identity().padding_side == "left"


def test_ids_end_below_their_number_even_where_the_vocabulary_has_holes(tmp_path: Path) -> None:
    toy.write_model(tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["good"] = 1000
    path.write_text(json.dumps(content))
    reader = TextReader(tmp_path / "model", 8, "error")
    assert reader.read(["good"], ["a"]).ids.max() == 1000
    assert reader.num_ids == 1001


def test_a_directory_without_a_fast_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="save_pretrained"):
        TextReader(tmp_path, 8, "error")


def test_identity_sees_content_and_special_tokens_and_not_the_layout_of_the_file(
    encoder_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoder_dir, tmp_path / "same")
    path = tmp_path / "same" / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=7))
    before = TextReader(encoder_dir, 8, "error").identity()
    assert TextReader(tmp_path / "same", 8, "error").identity() == before
    content["model"]["vocab"]["good"], content["model"]["vocab"]["bad"] = (
        content["model"]["vocab"]["bad"],
        content["model"]["vocab"]["good"],
    )
    path.write_text(json.dumps(content))
    assert TextReader(tmp_path / "same", 8, "error").identity().content != before.content


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9), st.data())
def test_padded_is_the_naive_loop(rows: list[list[int]], data: st.DataObject) -> None:
    offsets = np.cumsum([0] + [len(row) for row in rows])
    tokens = Tokens(np.concatenate([np.array(row, np.int32) for row in rows]), offsets, 0)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9)))
    ids, mask = tokens.padded(chosen, pad_id=0).values()
    longest = max(len(rows[i]) for i in chosen)
    assert ids.tolist() == [rows[i] + [0] * (longest - len(rows[i])) for i in chosen]
    assert mask.tolist() == [[n < len(rows[i]) for n in range(longest)] for i in chosen]
    assert tokens.lengths.tolist() == [len(row) for row in rows]


def test_a_learned_tokenizer_is_the_same_every_time_and_reads_its_own_text(tmp_path: Path) -> None:
    texts = [f"{text} {word}ing" for text, word in zip(toy.texts(300), toy.WORDS * 20, strict=False)]
    made = [TextReader.learn(texts, 60, tmp_path / name, 16) for name in ("a", "b")]
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (
        tmp_path / "b" / "tokenizer.json"
    ).read_bytes()
    reader = made[0]
    assert reader.num_ids == 60
    tokens = reader.read(texts[:3], texts[:3])
    assert tokens.row(0)[0] == reader.special["cls_token"]
    assert tokens.row(0)[-1] == reader.special["sep_token"]
    assert reader.special["unk_token"] not in tokens.ids
    again = TextReader(tmp_path / "a", 16, "truncate")
    assert again.identity() == reader.identity()
    assert again.read(texts[:3], texts[:3]).ids.tolist() == tokens.ids.tolist()


@pytest.mark.parametrize("max_length", [64, 6, 3])
def test_words_of_tokens_are_those_of_auto_tokenizer_whole_and_cut(tmp_path: Path, max_length: int) -> None:
    encoders.write(tmp_path / "model", "token-classification")
    auto = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [*toy.texts(20), "ending scripts, BRIGHT film", "unknown [SEP] film", "caf\u00e9 \U0001f600 film"]
    found = TextReader(tmp_path / "model", max_length, "truncate").read(texts, texts, words=True)
    assert found.words is not None
    for i, text in enumerate(texts):
        wanted = auto(text.split(), is_split_into_words=True, truncation=True, max_length=max_length)
        own = slice(found.offsets[i], found.offsets[i + 1])
        assert found.ids[own].tolist() == wanted["input_ids"]
        assert found.words[own].tolist() == [NO_WORD if w is None else w for w in wanted.word_ids()]
    assert TextReader(tmp_path / "model", 64, "error").read(texts, texts).words is None


@pytest.mark.parametrize("kind", ["space before, kept", "space before, trimmed", "underscore"])
def test_a_token_that_begins_with_a_space_belongs_to_the_word_behind_it(tmp_path: Path, kind: str) -> None:
    """Byte-level BPE, with and without the space in its offsets, and a sentencepiece-like Unigram."""
    texts = [*toy.texts(30), "caf\u00e9 \u00fc film", "x good", "a space "]
    if kind == "underscore":
        tokenizer, sign = Tokenizer(models.Unigram()), "\u2581"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"])
    else:
        tokenizer, sign = Tokenizer(models.BPE()), "\u0120"
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets="trimmed" in kind)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts[:30], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = TextReader(tmp_path, 64, "error").read(texts, texts, words=True)
    assert found.words is not None
    for i, text in enumerate(texts):
        pieces = tokenizer.encode(text).tokens
        starts = np.cumsum([place > 0 and piece.startswith(sign) for place, piece in enumerate(pieces)])
        assert found.words[found.offsets[i] : found.offsets[i + 1]].tolist() == starts.tolist()


def test_a_row_of_no_tokens_has_no_word(decoder_dir: Path) -> None:
    found = TextReader(decoder_dir, 8, "error").read(["", "good"], ["a", "b"], words=True)
    assert found.words is not None
    assert found.words[0] == NO_WORD
    assert len(found.words) == len(found.ids)
