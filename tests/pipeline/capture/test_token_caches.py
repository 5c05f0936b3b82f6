"""A classifier of tokens as teacher, from words with tags to a verified cache of logits for every token."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

from pipeline.capture.seal import capture_summary
from pipeline.config.params import Run, RunInputs, Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent
from pipeline.config.teachers import Teacher
from pipeline.data.rows import NO_LABEL, POOL, load_rows
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.evaluation import latency
from pipeline.evaluation.teachers import evaluate_teacher
from pipeline.report.build import build_report
from pipeline.runtime.files import write_json
from pipeline.teachers.record import RECORD, teacher_reader, teacher_record
from pipeline.teachers.scoring import token_labels
from pipeline.training.run import train_run
from storage import Cache
from storage.errors import DataError, SpecMismatch, TeacherError
from storage.records import LogitRows
from storage.seal import SealedParts, seal
from storage.writer import Store
from tests import toy
from tests.pipeline import encoders
from tests.pipeline.capture.test_capture import content, no_teacher
from tests.pipeline.encoders import TAGS, Project


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished project that no test may change."""
    project = Project.start(tmp_path_factory.mktemp("tags"), "token-classification")
    project.make_teacher()
    project.capture()
    return project


@pytest.fixture
def own(made: Project, tmp_path: Path) -> Project:
    return made.copy(tmp_path / "own")


def held(cache: Cache) -> dict[str, LogitRows]:
    """row id -> what the cache holds of it."""
    found = {}
    for shard in cache.shards:
        rows = cache.read(shard)
        assert isinstance(rows, LogitRows)
        for place, row in enumerate(rows.row_ids.to_pylist()):
            found[row] = rows.take(np.array([place]))
    return found


def change_weights(own: Project, name: str, factor: float) -> None:
    path = own.teacher / "model.safetensors"
    weights = load_file(path)
    path.unlink()  # it is a link to the model's
    save_file(weights | {name: weights[name] * factor}, path, metadata={"format": "pt"})


def test_logits_are_those_of_the_live_model_at_every_token_special_ones_too(made: Project) -> None:
    """Each row is compared with the model run on it alone: padding of others must not be seen."""
    rows, kept = made.rows(), held(Cache.open(made.cache))
    model = AutoModelForTokenClassification.from_pretrained(made.root / "model").eval()
    auto = AutoTokenizer.from_pretrained(made.root / "model")
    assert kept.keys() == set(rows.row_ids.to_pylist())
    lengths = set()
    for row, text in zip(rows.row_ids.to_pylist(), rows.texts.to_pylist(), strict=True):
        ids = auto(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0].numpy()
        assert kept[row].token_ids.tolist() == ids[0].tolist()
        assert kept[row].logits == pytest.approx(logits, abs=1e-5)
        lengths.add(len(logits))
    assert len(lengths) > 5


def test_a_cache_of_tokens_is_verified_and_explains_itself(made: Project) -> None:
    record, cache = made.check(), Cache.open(made.cache)
    assert (record["rows"], record["replayed_rows"]) == (60, 60)
    assert (cache.identity.spec.task, cache.labels, cache.codec) == ("token-classification", TAGS, "dense")
    assert cache.manifest.format_version == 3
    assert record["positions"] == sum(len(rows.logits) for rows in held(cache).values())


def test_a_killed_capture_continues_to_the_same_bytes_and_loads_the_teacher_only_where_needed(
    own: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(own.cache)
    shards = sorted((own.root / "store").rglob("shard.json"))
    shutil.rmtree(shards[1].parent)
    shutil.rmtree(own.cache)
    assert 0 < own.capture().computed_rows <= 16
    assert content(own.cache) == before
    monkeypatch.setattr("pipeline.engines.classifier.load_classifier", no_teacher)
    assert own.capture().computed_rows == 0
    assert content(own.cache) == before


def test_another_teacher_is_another_identity_and_found_by_the_replay_where_that_is_forged(
    own: Project,
) -> None:
    honest = Cache.open(own.cache).identity
    change_weights(own, "classifier.weight", 1.5)
    with pytest.raises(SpecMismatch, match=r"teacher\.weights"):
        own.check()
    own.capture()
    assert own.check()["rows"] == 60
    forged = Cache.open(own.cache)
    shards = Store(own.root / "store").finished(forged.identity)
    files = {path.name: path.read_bytes() for path in forged.tokenizer_dir.iterdir()}
    seal(own.cache, SealedParts(honest, shards, files, {}))
    own.make_teacher()
    with pytest.raises(SpecMismatch, match="is not what its teacher gives today") as refused:
        own.check()
    assert all(": logits" in fault.field for fault in refused.value.mismatches)


def test_a_pool_is_captured_too_and_a_cut_row_has_as_many_targets_as_tokens(own: Project) -> None:
    own.prepare(where={"kind": "a"}, pool={"where": {"kind": "b"}})
    assert len(own.rows().select(POOL)) == 30
    with pytest.raises(DataError, match="longer than max_length 8"):
        own.make_teacher(max_length=8)
    own.make_teacher(max_length=8, too_long="truncate")
    assert own.capture().cut_rows > 0
    assert own.check()["rows"] == 60
    assert max(len(rows.logits) for rows in held(Cache.open(own.cache)).values()) == 8


def test_a_teacher_is_scored_at_the_first_token_of_each_word(made: Project) -> None:
    record = teacher_record(made.teacher)
    model = AutoModelForTokenClassification.from_pretrained(made.root / "model").eval()
    auto = AutoTokenizer.from_pretrained(made.root / "model")
    rows, right = made.rows(), []
    for index in rows.select("test"):
        words = rows.texts[int(index)].as_py().split()
        read = auto(words, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**read).logits[0].argmax(-1).tolist()
        numbers = read.word_ids()
        firsts = [numbers.index(word) for word in range(len(words))]
        right += [
            TAGS[logits[f]] == tag for f, tag in zip(firsts, encoders.tags(" ".join(words)), strict=True)
        ]
    assert record["task"] == "token-classification"
    assert record["accuracy"]["test"] == pytest.approx(np.mean(right))
    assert 0 < record["accuracy"]["test"] < 1


def test_labels_stand_at_first_tokens_and_nowhere_else(made: Project) -> None:
    rows = made.rows()
    reader = teacher_reader(made.teacher)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids, words=True)
    found = token_labels(rows, tokens)
    assert rows.tags is not None
    for i in range(len(rows.row_ids)):
        part = slice(tokens.offsets[i], tokens.offsets[i + 1])
        assert [label for label in found[part].tolist() if label != NO_LABEL] == rows.tags[i].as_py()
        pieces = [reader.tokenizer.id_to_token(int(token)) for token in tokens.ids[part]]
        inside = [piece.startswith("##") or piece in ("[CLS]", "[SEP]") for piece in pieces]
        assert (found[part] == NO_LABEL).tolist() == inside


def test_rows_of_one_word_without_special_tokens_between_them_have_a_label_each(made: Project) -> None:
    rows = made.rows()._replace(row_ids=pa.array(["a", "b", "c"]), tags=pa.array([[1], [2, 0], [1]]))
    words = np.array([0, 0, 0, 1, 0], np.int32)
    tokens = Tokens(np.arange(5, dtype=np.int32), np.array([0, 1, 4, 5]), 0, words)
    assert token_labels(rows, tokens).tolist() == [1, 2, NO_LABEL, 0, 1]


def test_rows_of_a_pool_and_words_that_were_cut_off_have_no_label(made: Project) -> None:
    rows = made.rows()
    texts = rows.texts.to_pylist()
    cut = TextReader(made.teacher, 4, "truncate").read(texts, rows.row_ids, words=True)
    found = token_labels(rows, cut)
    assert (found != NO_LABEL).sum() <= 2 * len(texts)
    none = rows._replace(tags=pa.array([[]] * len(texts), pa.list_(pa.int32())))
    assert (token_labels(none, cut) == NO_LABEL).all()


def test_outputs_in_another_order_are_scored_by_name_and_refused_by_the_capture(
    own: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = teacher_record(own.teacher)["accuracy"]["test"]
    shutil.rmtree(own.root / "model")
    encoders.write(own.root / "model", "token-classification", TAGS[::-1])
    record = own.make_teacher()
    assert record["labels"] == list(TAGS[::-1])
    assert record["accuracy"]["test"] != score, "the same outputs under other names"
    monkeypatch.setattr("pipeline.engines.classifier.load_classifier", no_teacher)
    with pytest.raises(TeacherError, match="not the dataset's labels, in its order"):
        own.capture()


def test_a_teacher_that_does_not_fit_is_refused(own: Project) -> None:
    with pytest.raises(TeacherError, match="only models of labelled rows are fine-tuned"):
        own.make_teacher(train={})
    encoders.write(own.root / "other", "token-classification", ("O", "B-PER", "I-PER"))
    with pytest.raises(TeacherError, match="are not this dataset's"):
        own.make_teacher(model=str(own.root / "other"))
    encoders.write(own.root / "headless", "masked-lm")
    with pytest.raises(TeacherError, match=r"not a trained classifier: its weights lack classifier\.bias"):
        own.make_teacher(model=str(own.root / "headless"))
    encoders.write(own.root / "four", "token-classification", (*TAGS, "X"))
    with pytest.raises(TeacherError, match="gives 4 logits a token, and there are 3 labels"):
        own.make_teacher(model=str(own.root / "four"), labels=list(TAGS))
    assert not (own.teacher / RECORD).exists()


def test_rows_longer_than_the_models_positions_are_refused_before_the_capture(own: Project) -> None:
    row = {"words": ["film"] * 40, "tags": ["O"] * 40}
    with (own.root / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    own.prepare()
    with pytest.raises(TeacherError, match="cannot read rows of length 42"):
        own.make_teacher(max_length=64)


def test_logits_that_are_not_finite_name_the_row(own: Project) -> None:
    rows, reader = own.rows(), teacher_reader(own.teacher)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    path = own.teacher / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    name = "bert.embeddings.word_embeddings.weight"
    only = int(reader.tokenizer.token_to_id("br"))
    weights[name][only] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    having = {rows.row_ids[i].as_py() for i in range(len(rows.row_ids)) if only in tokens.row(i)}
    with pytest.raises(TeacherError, match="the teacher's logits for row") as refused:
        own.capture()
    assert any(row in str(refused.value) for row in having)
    assert 0 < len(having) < 60


def test_pooled_states_are_not_kept_with_targets_a_token(own: Project) -> None:
    with pytest.raises(TeacherError, match="token-classification has one target a token"):
        own.capture(hidden={"layers": [1]})


def test_the_teachers_row_of_the_report(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "LATENCY_REPEATS", 2)
    entry = Teacher(model="x", dataset="toy")
    found = evaluate_teacher("tiny", entry, own.dataset, own.teacher)
    assert found["accuracy"]["mean"] == pytest.approx(teacher_record(own.teacher)["accuracy"]["test"])
    assert found["agreement"]["mean"] == 1
    assert found["latency_ms_batch_1"]["mean"] > 0
    write_json(found, own.root / "eval" / "teacher-tiny.json")
    summary = capture_summary(own.job(), own.capture())
    write_json(summary, own.root / "capture" / "toy.json")
    kinds_of_results = ("eval", "capture", "models", "export")
    build_report(*(own.root / name for name in kinds_of_results), own.root / "index.html")
    assert f"{100 * found['accuracy']['mean']:.1f} %" in (own.root / "index.html").read_text()


def run(own: Project, **student: Any) -> None:
    """Train a student from the project's cache."""
    own.root.joinpath("verified.json").write_text(json.dumps(own.check()))
    paths = RunInputs(own.cache, own.dataset, own.root / "verified.json", own.root / "out")
    entry = Run(dataset="toy", cache="toy", student="fc", recipe="kd")
    train_run("tags", entry, FCStudent(kind="fc", **student), Recipe(), paths, Workers(seeds_at_once=1))


def test_a_run_over_such_a_cache_is_refused_with_the_tasks_that_can_be(own: Project) -> None:
    with pytest.raises(SpecMismatch, match=r"spec\.task +token-classification") as refused:
        run(own)
    assert "sequence-classification" in str(refused.value)
    assert not (own.root / "out").exists()


def test_prepared_rows_of_words_are_read_as_texts_too(made: Project) -> None:
    assert load_rows(made.dataset).texts.to_pylist() == toy.texts(60)
