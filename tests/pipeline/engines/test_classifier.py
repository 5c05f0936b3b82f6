"""Batches, buckets and padding never change the logits of a row."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.capture.identity import capture_identity
from pipeline.config.caches import CacheEntry, Hidden
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.engines.hidden_states import HiddenStateRecorder
from pipeline.engines.inference import TOKENS_PER_BATCH, InferenceRequest, batches_by_length, infer_rows
from pipeline.engines.loading import load_classifier
from pipeline.teachers.record import teacher_reader
from storage.errors import TeacherError
from storage.spec import HiddenSpec
from tests import toy
from tests.pipeline import decoder
from tests.pipeline.conftest import World

TEXTS = [text for text in toy.texts(40, seed=3) if len(text) < 60] + ["good", "good!", "!"]


def read(directory: Path) -> tuple[TextReader, Tokens]:
    reader = teacher_reader(directory)
    return reader, reader.read(TEXTS, TEXTS)


def everything(num: int) -> np.ndarray:
    return np.arange(num, dtype=np.int64)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_batched_answers_are_those_of_single_rows_in_their_order(
    kind: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = world.teacher
    if kind == "decoder":
        directory = tmp_path / "gpt"
        decoder.write(directory)
    reader, tokens = read(directory)
    model = load_classifier(directory, pad_token_id=reader.pad_id)
    hidden = HiddenSpec(layers=(0, 2), pool="mean", width=16, dtype="float32")
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 64)
    seen: list[int] = []
    rows = everything(len(TEXTS))[::-1].copy()
    recorder = HiddenStateRecorder(model, hidden, tokens.lengths[rows], rows)
    request = InferenceRequest(tokens, rows, reader.pad_id, advance=seen.append)
    together = infer_rows(model, request, recorder.record)
    assert sum(seen) == len(TEXTS)
    assert max(seen) > 1
    with torch.inference_mode():
        for place, row in enumerate(rows):
            ids = torch.from_numpy(tokens.row(row).astype(np.int64))[None]
            alone = model(input_ids=ids, output_hidden_states=True)
            assert together[place] == pytest.approx(alone.logits[0].numpy(), abs=1e-5)
            for layer in (0, 2):
                mean = alone.hidden_states[layer][0].mean(0).numpy()
                assert recorder.found[f"layer.{layer}"][place] == pytest.approx(mean, abs=1e-5)


def test_the_first_tokens_state_is_that_of_transformers(world: World) -> None:
    reader, tokens = read(world.teacher)
    model = load_classifier(world.teacher)
    hidden = HiddenSpec(layers=(1,), pool="first", width=16, dtype="float32")
    recorder = HiddenStateRecorder(model, hidden, tokens.lengths[:5], everything(5))
    infer_rows(model, InferenceRequest(tokens, everything(5), reader.pad_id), recorder.record)
    with torch.inference_mode():
        for row in range(5):
            ids = torch.from_numpy(tokens.row(row).astype(np.int64))[None]
            state = model(input_ids=ids, output_hidden_states=True).hidden_states[1][0, 0]
            assert recorder.found["layer.1"][row] == pytest.approx(state.numpy(), abs=1e-5)


def test_a_logit_that_is_not_finite_names_the_row(world: World) -> None:
    reader, tokens = read(world.teacher)
    model = load_classifier(world.teacher)
    word = int(tokens.row(3)[1])
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[word] = float("nan")
    poisoned = {TEXTS[i] for i in range(len(TEXTS)) if word in tokens.row(i)}
    request = InferenceRequest(tokens, everything(len(TEXTS)), reader.pad_id, row_ids=TEXTS)
    with pytest.raises(TeacherError, match="are not finite") as refused:
        infer_rows(model, request)
    assert any(f"row {text} are" in str(refused.value) for text in poisoned)
    clean = np.array([i for i in range(len(TEXTS)) if TEXTS[i] not in poisoned])
    infer_rows(model, request._replace(rows=clean))


def test_hidden_states_of_a_decoder_are_recorded(tmp_path: Path) -> None:
    decoder.write(tmp_path / "gpt")
    hidden = Hidden(layers=(0, 2))
    entry = CacheEntry(dataset="toy", teacher="gpt", hidden=hidden, precision="float32")
    spec = capture_identity(entry, tmp_path / "gpt").spec
    assert spec.hidden is not None
    assert spec.hidden.width == 16
    with pytest.raises(TeacherError, match="layers 0"):
        capture_identity(entry.model_copy(update={"hidden": Hidden(layers=(3,))}), tmp_path / "gpt")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_batches_by_length_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(np.array(lengths), budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
