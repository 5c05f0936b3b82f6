"""A capture computes each row once, whatever was interrupted or appended; a replay finds forgeries."""

import json
import pickle
import pkgutil
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.seal import capture_summary
from pipeline.config.teachers import Teacher, TeacherTraining
from pipeline.data.prepare import prepare_dataset
from pipeline.engines import classifier
from pipeline.engines.hidden_states import HiddenStateRecorder
from pipeline.engines.inference import InferenceRequest, infer_rows
from pipeline.engines.loading import load_classifier
from pipeline.engines.model_files import teacher_identity
from pipeline.teachers.prepare import prepare_teacher
from pipeline.teachers.record import RECORD, teacher_reader
from storage import Cache, errors
from storage.errors import ShardUnwritten, SpecMismatch, StillroomError, StoreFull, TeacherError
from storage.seal import SealedParts, seal
from tests import toy
from tests.pipeline.conftest import World


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path / "own")


def content(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def no_teacher(*_: object, **__: object) -> None:
    raise AssertionError("the teacher was loaded")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def append_rows(own: World, num: int) -> None:
    with (own.root / "more.csv").open("w") as file:
        file.write((own.root / "reviews.csv").read_text())
        file.writelines(f"{text},{toy.label(text)},labelled\n" for text in toy.texts(num, seed=99))
    entry = own.params.datasets["toy"].model_copy(update={"path": str(own.root / "more.csv")})
    prepare_dataset("toy", entry, own.dataset)


FULL = OSError(28, "No space left on device"), StoreFull, "no space left while writing"
BROKEN = OSError(5, "Input/output error"), ShardUnwritten, "OSError: [Errno 5] Input/output error"
WRONG = ValueError("what is this?"), ShardUnwritten, "ValueError: what is this?"
WriterError = tuple[Exception, type[StillroomError], str]


def check_that_a_writers_error_names_its_shard(
    again: Callable[[], Captured], store: Path, writer: str, fault: WriterError
) -> None:
    """Capture into an empty store; `writer`, which is called once a shard, fails at the second one."""
    cause, kind, expected = fault
    write, calls = pkgutil.resolve_name(writer), []

    def fail_once(*args: object, **named: object) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise cause
        return write(*args, **named)

    shutil.rmtree(store)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, fail_once)
        with pytest.raises(kind) as refused:
            again()
    message = str(refused.value)
    assert expected in message
    assert "Finished shards are kept" in message
    assert len(calls) == 2, "it ends the capture"
    assert len(list(store.rglob("shard.json"))) == 1, "what was written stays"
    named = re.search(r"shard ([0-9a-f]{12}) \((\d+) rows, ([0-9a-f]{32}) to ([0-9a-f]{32})\)", message)
    assert named
    again()
    (shard,) = [path for path in store.rglob("*.parquet") if path.name.startswith(named[1])]
    rows = pq.read_table(shard).column("row_id").to_pylist()
    assert [str(len(rows)), rows[0], rows[-1]] == list(named.groups()[1:])


@pytest.mark.parametrize("fault", [FULL, BROKEN], ids=["full", "broken"])
def test_a_writers_error_stops_the_capture(own: World, fault: WriterError) -> None:
    writer = "storage.records.write"
    check_that_a_writers_error_names_its_shard(own.capture, own.store.root, writer, fault)


def test_a_cache_holds_every_row_with_the_logits_of_the_live_teacher(world: World) -> None:
    cache, rows = Cache.open(world.cache), world.rows()
    assert cache.num_rows == len(rows.row_ids) == 180
    assert cache.labels == rows.label_names
    assert cache.row_ids().to_pylist() == rows.row_ids.to_pylist(), "in the dataset's order"
    reader = teacher_reader(world.teacher)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    hidden = cache.identity.spec.hidden
    assert hidden is not None
    model, every_row = load_classifier(world.teacher), np.arange(180)
    recorder = HiddenStateRecorder(model, hidden, tokens.lengths, every_row)
    logits = infer_rows(model, InferenceRequest(tokens, every_row, reader.pad_id), recorder.record)
    place = {row: index for index, row in enumerate(rows.row_ids.to_pylist())}
    for shard in cache.shards:
        kept = cache.read(shard)
        where = [place[row] for row in kept.row_ids.to_pylist()]
        assert kept.logits == pytest.approx(logits[where], abs=1e-5)
        assert kept.num_tokens.tolist() == tokens.lengths[where].tolist()
        for layer in (1, 2):
            name = f"layer.{layer}"
            assert cache.hidden(shard, name) == pytest.approx(recorder.found[name][where], abs=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_capture_that_was_killed_anywhere_ends_in_the_same_bytes(
    own: World, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(own.cache)
    shards = sorted(path.parent for path in own.store.root.rglob("shard.json"))
    gone = random.Random(seed).sample(shards, k=1 + 2 * seed)
    computed = sum(json.loads((path / "shard.json").read_text())["entry"]["rows"] for path in gone)
    for path in gone:
        shutil.rmtree(path)
    shutil.rmtree(own.cache)
    assert own.capture().computed_rows == computed
    assert content(own.cache) == before
    monkeypatch.setattr(classifier, "load_classifier", no_teacher)
    assert own.capture().computed_rows == 0
    assert content(own.cache) == before, "and sealing again, without the teacher, changes nothing"


def test_two_captures_from_nothing_are_the_same_bytes(own: World) -> None:
    before = content(own.cache)
    for made in (own.cache, own.store.root):
        shutil.rmtree(made)
    assert own.capture().computed_rows == 180
    assert content(own.cache) == before


def test_before_the_teacher_is_loaded_the_stage_may_refuse(own: World) -> None:
    shutil.rmtree(own.store.root)

    def refuse() -> None:
        raise TeacherError("not here")

    with pytest.raises(TeacherError, match="not here"):
        capture_cache(CaptureJob("toy", own.entry(), own.dataset, own.teacher, own.cache, own.store, refuse))


def test_appended_rows_cost_themselves_alone(own: World) -> None:
    append_rows(own, 20)
    done = own.capture()
    assert done.computed_rows == 20
    assert done.manifest.num_rows == 200
    own.check()


def test_a_changed_spec_starts_clean_and_changing_back_computes_nothing(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(own.cache)
    assert own.capture(hidden=None).computed_rows == 180
    monkeypatch.setattr(classifier, "load_classifier", no_teacher)
    assert own.capture(shard_rows=7).computed_rows == 0, "the size of shards is not part of their identity"
    assert own.capture().computed_rows == 0
    assert content(own.cache) == before


def test_a_damaged_shard_in_the_store_is_made_again(own: World) -> None:
    before = content(own.cache)
    victim = next(path for path in sorted(own.store.root.rglob("*.parquet")))
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.unlink()  # it is a link into the cache
    victim.write_bytes(raw)
    assert own.capture().computed_rows > 0
    assert content(own.cache) == before


def test_a_teacher_whose_labels_are_not_the_datasets_is_refused_before_it_is_run(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_json(own.teacher / RECORD, labels=["positive", "negative"])
    monkeypatch.setattr(classifier, "load_classifier", no_teacher)
    with pytest.raises(TeacherError, match="not the dataset's labels, in its order"):
        own.capture()


def other_weights(own: World) -> None:
    path = own.teacher / "model.safetensors"
    tensors = load_file(path)
    tensors["classifier.weight"] = tensors["classifier.weight"] * 1.5
    path.unlink()  # it is a link to the model's
    save_file(tensors, path, {"format": "pt"})


def other_labels(own: World) -> None:
    change_json(own.dataset / "summary.json", labels=["positive", "negative"])


def other_tokenizer(own: World) -> None:
    path = own.teacher / "tokenizer.json"
    words = json.loads(path.read_text())
    vocab = words["model"]["vocab"]
    vocab["good"], vocab["bad"] = vocab["bad"], vocab["good"]
    path.write_text(json.dumps(words))


def other_maximum(own: World) -> None:
    change_json(own.teacher / RECORD, max_length=16)


def other_config(own: World) -> None:
    change_json(own.teacher / "config.json", layer_norm_eps=0.1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (other_weights, "teacher.weights"),
        (other_config, "teacher.config"),
        (other_labels, "dataset.labels"),
        (other_tokenizer, "tokenizer.content"),
        (other_maximum, "spec.max_length"),
        (lambda own: append_rows(own, 1), "rows without one"),
    ],
)
def test_verify_names_the_field_that_has_changed_since_the_capture(
    own: World, change: Callable[[World], None], field: str
) -> None:
    change(own)
    with pytest.raises(SpecMismatch) as refused:
        own.check()
    assert [m.field for m in refused.value.mismatches if m.field == field] == [field]


def test_verify_is_the_same_record_every_time(own: World) -> None:
    record = own.check()
    assert record == own.check() == json.loads(own.verified.read_text())
    assert record["replayed_rows"] == 180


def test_replay_catches_a_cache_by_other_weights_with_a_forged_identity(own: World) -> None:
    honest = Cache.open(own.cache).identity
    other_weights(own)
    own.capture()
    forged = Cache.open(own.cache)
    shards = own.store.finished(forged.identity)
    files = {path.name: path.read_bytes() for path in forged.tokenizer_dir.iterdir()}
    seal(own.cache, SealedParts(honest, shards, files, {}))
    shutil.rmtree(own.teacher)
    own.make_teacher()
    with pytest.raises(SpecMismatch, match="is not what its teacher gives today") as refused:
        own.check()
    assert all(": logits" in m.field for m in refused.value.mismatches)


def test_replay_catches_a_row_whose_text_was_changed_under_its_id(own: World) -> None:
    table = pq.read_table(own.dataset / "rows.parquet")
    texts = table.column("text").to_pylist()
    texts[5] = "another text"
    changed = table.set_column(table.schema.get_field_index("text"), "text", pa.array(texts))
    pq.write_table(changed, own.dataset / "rows.parquet")
    with pytest.raises(SpecMismatch, match="token ids"):
        own.check()


def test_a_summary_counts_what_was_made(world: World) -> None:
    captured = Captured(Cache.open(world.cache).manifest, 0, 1.5, 0)
    found: dict[str, Any] = capture_summary(world.job(), captured)
    assert found["rows"] == 180
    assert found["logit_bytes"] + found["hidden_bytes"] == found["bytes"]
    assert found["seconds"] == 1.5
    assert found["teacher_train_seconds"] is None


def test_a_teacher_of_more_outputs_than_labels_is_refused(own: World) -> None:
    toy.write_model(own.root / "three", labels=("a", "b", "c"))
    entry = Teacher(
        model=str(own.root / "three"), dataset="toy", labels=("negative", "positive"), max_length=32
    )
    with pytest.raises(TeacherError, match="gives 3 logits a row, and there are 2 labels"):
        prepare_teacher("three", entry, own.dataset, own.root / "made")


@pytest.mark.parametrize("trained", [False, True])
def test_rows_longer_than_the_models_positions_are_refused_before_training(own: World, trained: bool) -> None:
    with (own.root / "reviews.csv").open("a") as file:
        file.write("good " * 38 + ",1,labelled\n")
    own.prepare()
    train = TeacherTraining(epochs=1) if trained else None
    entry = own.params.teachers["tiny"].model_copy(update={"max_length": 64, "train": train})
    assert "good good" in own.rows().texts[120].as_py()
    with pytest.raises(TeacherError, match="cannot read rows of length 40") as refused:
        prepare_teacher("tiny", entry, own.dataset, own.teacher)
    assert "Lower max_length" in str(refused.value)


def test_what_a_teacher_is_made_into_twice_leaves_the_models_own_files_alone(own: World) -> None:
    before = content(own.root / "model")
    own.make_teacher()
    own.make_teacher()
    train = TeacherTraining(epochs=1, batch_rows=16, precision="float32", dropout=0.0)
    entry = own.params.teachers["tiny"].model_copy(update={"train": train, "model": str(own.root / "model")})
    record = prepare_teacher("tiny", entry, own.dataset, own.teacher)
    assert record["training"]["steps"] > 0
    assert record["labels"] == ["negative", "positive"]
    assert content(own.root / "model") == before
    assert teacher_identity(own.teacher).weights != teacher_identity(own.root / "model").weights


def test_every_error_of_the_house_survives_the_way_between_processes() -> None:
    classes = [StillroomError]
    for kind in classes:
        classes += kind.__subclasses__()
    for kind in classes:
        made = (
            kind("what", [errors.Mismatch("field", 1, 2)], "do this")  # type: ignore[call-arg]
            if kind is SpecMismatch
            else kind("what\nto do")
        )
        again = pickle.loads(pickle.dumps(made))
        assert (type(again), str(again)) == (kind, str(made))
