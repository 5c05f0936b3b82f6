"""Students: padding never changes an answer, and what is saved comes back to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeline.config.students import Student
from pipeline.students.bilstm import BiLSTM
from pipeline.students.registry import build_student, load_student, save_student
from pipeline.students.tinybert import TinyBERT
from storage.errors import AssetError

ENTRIES: dict[str, dict[str, Any]] = {
    "fc": {"kind": "fc", "embedding": 8, "hidden": 8},
    "bilstm": {"kind": "bilstm", "embedding": 8, "hidden": 6},
    "tinybert": {"kind": "tinybert", "layers": 2, "width": 16, "heads": 2, "max_length": 12},
}
VOCAB, CLASSES, LENGTHS = 50, 3, (7, 1, 12, 4)


def entry(kind: str) -> Student:
    made: Student = TypeAdapter(Student).validate_python(ENTRIES[kind])
    return made


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return build_student(entry(kind), VOCAB, CLASSES).eval()


def batch(longest: int = 12, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    ids = nn.functional.pad(ids, (0, longest - ids.shape[1]))
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    return ids.masked_fill(~mask, pad), mask


@pytest.mark.parametrize("kind", ENTRIES)
def test_neither_padding_nor_what_stands_there_nor_the_company_changes_an_answer(kind: str) -> None:
    model = build(kind)
    with torch.inference_mode():
        together = model(*batch())
        assert torch.allclose(model(*batch(pad=7)), together, atol=1e-6)
        if kind != "tinybert":  # it has no more positions
            assert torch.allclose(model(*batch(longest=20)), together, atol=1e-6)
        for row, length in enumerate(LENGTHS):
            ids = batch()[0][row : row + 1, :length]
            assert torch.allclose(model(ids, torch.ones_like(ids).bool())[0], together[row], atol=1e-5)


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_saved_student_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    save_student(tmp_path / "x", model, entry(kind), VOCAB, CLASSES)
    again = load_student(tmp_path / "x")
    with torch.inference_mode():
        assert torch.equal(again(*batch()), model(*batch()))
    assert not again.training
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["model.safetensors", "student.json"]
    facts = json.loads((tmp_path / "x" / "student.json").read_text())
    assert (facts["vocab_size"], facts["num_labels"]) == (VOCAB, CLASSES)


def test_the_bilstm_is_torchs_packed_bidirectional_lstm() -> None:
    model = build("bilstm")
    assert isinstance(model, BiLSTM)
    reference = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
    weights = dict(model.forwards.state_dict())
    weights |= {f"{name}_reverse": value for name, value in model.backwards.state_dict().items()}
    reference.load_state_dict(weights)
    ids, mask = batch()
    with torch.inference_mode():
        packed = pack_padded_sequence(
            model.embedding(ids), torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(reference(packed)[0], batch_first=True)
        rows = [states[row, :length] for row, length in enumerate(LENGTHS)]
        pooled = torch.stack([torch.cat([row.amax(0), row.mean(0)]) for row in rows])
        assert torch.allclose(model.head(pooled), model(ids, mask), atol=1e-6)


def test_a_bert_has_a_position_for_each_token_that_it_may_read() -> None:
    with torch.inference_mode():
        ids = torch.ones((1, 12), dtype=torch.int64)
        assert build("tinybert")(ids, ids.bool()).shape == (1, CLASSES)


@pytest.mark.parametrize("kind", ENTRIES)
def test_the_same_seed_builds_the_same_student(kind: str) -> None:
    first, second = build(kind).state_dict(), build(kind).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_directory_without_a_student_says_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="dvc repro train@run"):
        load_student(tmp_path / "run" / "seed-0")


def test_a_bert_with_its_features_answers_alike_and_has_its_states_and_vectors() -> None:
    model = build("tinybert")
    assert isinstance(model, TinyBERT)
    ids, mask = batch()
    with torch.inference_mode():
        seen = model.features({"input_ids": ids, "attention_mask": mask}, (1, 2))
        assert torch.equal(seen.logits_BC, model(ids, mask))
        assert [tuple(states.shape) for states in seen.states] == [(4, 12, 16)] * 3
        assert torch.equal(seen.states[0], model.bert.bert.embeddings(ids))
        for layer in (1, 2):
            attention = model.bert.bert.encoder.layer[layer - 1].attention.self
            parts = (attention.query, attention.key, attention.value)
            by_hand = torch.cat([part(seen.states[layer - 1]) for part in parts], -1)
            assert torch.equal(seen.qkv[layer], by_hand)
    assert model.bert.config._attn_implementation == "sdpa"  # the fused kernel
    assert not any(part._forward_hooks for part in parts)
