"""A masked language model as teacher, from text to a verified cache of entries for what it did not see."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from pipeline.capture.seal import capture_summary
from pipeline.config.params import Run, RunInputs, Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent
from pipeline.config.teachers import Teacher
from pipeline.engines import language_model
from pipeline.engines.engine import engine_inputs
from pipeline.engines.language_model import infer_entries
from pipeline.engines.loading import load_language_model
from pipeline.engines.registry import engine_for
from pipeline.evaluation.teachers import evaluate_teacher
from pipeline.report.build import build_report
from pipeline.runtime import hardware
from pipeline.runtime.files import write_json
from pipeline.teachers.record import teacher_reader, teacher_record
from pipeline.training.run import train_run
from storage import Cache, manifest
from storage.errors import SpecMismatch, TeacherError
from storage.seal import SealedParts, seal
from storage.writer import Store
from tests.pipeline import encoders
from tests.pipeline.capture.test_capture import content, no_teacher
from tests.pipeline.capture.test_language_caches import held
from tests.pipeline.encoders import Project

TOPK = {"codec": "topk", "k": 5, "layout": "plain"}
MASK = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished project that no test may change."""
    project = Project.start(tmp_path_factory.mktemp("masked"), "masked-lm")
    project.make_teacher()
    project.capture()
    return project


@pytest.fixture
def own(made: Project, tmp_path: Path) -> Project:
    return made.copy(tmp_path / "own")


def disguise(own: Project, change: Any) -> None:
    """Rewrite the manifest as a forger would, with a checksum that fits."""
    path = own.cache / manifest.MANIFEST_NAME
    body = json.loads(path.read_bytes())
    del body["checksum"]
    change(body)
    path.write_bytes(manifest.render(manifest.Manifest.model_validate(body)))


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_topk_entries_are_those_of_the_live_model_at_every_mask_and_nowhere_else(
    own: Project, share: float
) -> None:
    """Each row is compared with the model run on it alone: padding of others must not be seen."""
    own.capture(targets=TOPK, mask={"share": share, "seed": 3})
    rows, kept = own.rows(), held(Cache.open(own.cache))
    model = AutoModelForMaskedLM.from_pretrained(own.root / "model").eval()
    auto = AutoTokenizer.from_pretrained(own.root / "model")
    assert kept.keys() == set(rows.row_ids.to_pylist())
    lengths = set()
    for row, text in zip(rows.row_ids.to_pylist(), rows.texts.to_pylist(), strict=True):
        true, entry = auto(text)["input_ids"], kept[row]
        assert entry.token_ids is not None
        read = entry.token_ids.tolist()
        at = [i for i, token in enumerate(read) if token == MASK]
        assert len(at) == max(1, round(share * (len(true) - 2)))
        assert [token for i, token in enumerate(read) if i not in at] == [
            token for i, token in enumerate(true) if i not in at
        ]
        assert read[0] == true[0] == auto.cls_token_id
        assert read[-1] == true[-1] == auto.sep_token_id
        assert entry.entries.counts.tolist() == [5 if i in at else 0 for i in range(len(read))]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([read])).logits[0, at, : len(auto)]
        top = logits.log_softmax(-1).topk(5)
        assert np.log(entry.entries.weights.reshape(-1, 5)) == pytest.approx(top.values.numpy(), abs=1e-4)
        assert (entry.entries.ids.reshape(-1, 5) == top.indices.numpy()).all()
        lengths.add(len(read))
    assert len(lengths) > 5


@pytest.mark.parametrize("layout", ["plain", "compact"])
@pytest.mark.parametrize("codec", ["topk", "sample", "threshold"])
def test_every_codec_and_layout_is_verified_by_its_teacher(own: Project, codec: str, layout: str) -> None:
    targets = {"codec": codec, "layout": layout}
    own.capture(targets=targets)
    record, cache = own.check(targets=targets), Cache.open(own.cache)
    assert (record["rows"], record["replayed_rows"]) == (60, 60)
    assert (cache.identity.spec.task, cache.labels) == ("masked-lm", ())
    assert cache.manifest.format_version == 3
    for rows in held(cache).values():
        assert rows.token_ids is not None
        assert ((rows.entries.counts > 0) == (rows.token_ids == MASK)).all()


def test_a_killed_capture_continues_to_the_same_bytes_and_loads_the_teacher_only_where_needed(
    own: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(own.cache)
    shards = sorted((own.root / "store").rglob("shard.json"))
    shutil.rmtree(shards[1].parent)
    shutil.rmtree(own.cache)
    assert 0 < own.capture().computed_rows <= 16
    assert content(own.cache) == before
    monkeypatch.setattr("pipeline.engines.language_model.load_language_model", no_teacher)
    assert own.capture().computed_rows == 0
    assert content(own.cache) == before


def test_what_is_masked_does_not_depend_on_how_rows_were_cut_into_shards(own: Project) -> None:
    own.capture(targets=TOPK)
    first = held(Cache.open(own.cache))
    shutil.rmtree(own.root / "store")
    own.capture(targets=TOPK, shard_rows=7)
    again = held(Cache.open(own.cache))
    for row, rows in first.items():
        assert rows.token_ids is not None
        assert again[row].input_hashes == rows.input_hashes
        assert again[row].entries.weights == pytest.approx(rows.entries.weights, abs=1e-5)


def test_another_mask_is_another_cache_and_found_by_the_replay_where_that_is_forged(own: Project) -> None:
    assert own.capture(mask={"share": 0.15, "seed": 0}).computed_rows == 0, "the default"
    with pytest.raises(SpecMismatch, match=r"spec\.mask\.seed +0 +1"):
        own.check(mask={"share": 0.15, "seed": 1})
    with pytest.raises(SpecMismatch, match=r"spec\.mask\.share +0\.15 +0\.3"):
        own.check(mask={"share": 0.3, "seed": 0})
    assert own.capture(mask={"share": 0.15, "seed": 1}, targets=TOPK).computed_rows == 60
    disguise(own, lambda body: body["identity"]["spec"]["mask"].update(seed=0))
    with pytest.raises(SpecMismatch, match="token ids"):
        own.check(targets=TOPK)


def test_frequent_ids_are_ranked_by_as_many_targets_as_of_other_language_models(made: Project) -> None:
    rows, spec = made.rows(), Cache.open(made.cache).identity.spec
    inputs = engine_inputs(made.teacher, spec, teacher_reader(made.teacher), rows)
    assert inputs.read.has_target.sum() > 60
    assert 15 < engine_for(inputs).probability_mass(20).sum() < 40, "about 20"


def change_weights(own: Project) -> None:
    path = own.teacher / "model.safetensors"
    weights = load_file(path)
    path.unlink()  # it is a link to the model's
    name = "cls.predictions.transform.dense.weight"
    save_file(weights | {name: -weights[name]}, path, metadata={"format": "pt"})


def test_another_teacher_is_another_identity_and_found_by_the_replay_where_that_is_forged(
    own: Project,
) -> None:
    own.capture(targets=TOPK)
    honest = Cache.open(own.cache).identity
    change_weights(own)
    with pytest.raises(SpecMismatch, match=r"teacher\.weights"):
        own.check(targets=TOPK)
    own.capture(targets=TOPK)
    assert own.check(targets=TOPK)["rows"] == 60
    forged = Cache.open(own.cache)
    shards = Store(own.root / "store").finished(forged.identity)
    files = {path.name: path.read_bytes() for path in forged.tokenizer_dir.iterdir()}
    seal(own.cache, SealedParts(honest, shards, files, {}))
    own.make_teacher()
    with pytest.raises(SpecMismatch, match="is not what its teacher gives today"):
        own.check(targets=TOPK)


def test_a_replay_finds_a_mask_without_a_target(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    infer = infer_entries

    def forgetful(*arguments: Any) -> Any:
        entries, entropy = infer(*arguments)
        first = int(np.flatnonzero(entries.counts)[0])
        counts = np.where(np.arange(len(entries.counts)) == first, 0, entries.counts)
        gone = slice(entries.offsets[first], entries.offsets[first + 1])
        fewer = entries._replace(
            offsets=np.concatenate([[0], np.cumsum(counts)]),
            ids=np.delete(entries.ids, gone),
            weights=np.delete(entries.weights, gone),
            num_exact=np.minimum(entries.num_exact, counts).astype(np.int32),
        )
        return fewer, entropy

    shutil.rmtree(own.root / "store")
    monkeypatch.setattr(language_model, "infer_entries", forgetful)
    own.capture(targets=TOPK)
    monkeypatch.undo()
    with pytest.raises(SpecMismatch, match="positions with a target"):
        own.check(targets=TOPK)


def test_a_teacher_takes_the_perplexity_of_what_it_did_not_see(
    own: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "computes_in_bfloat16", lambda: False)
    record, rows = own.make_teacher(), own.rows()
    model = load_language_model(own.teacher, "float32", "AutoModelForMaskedLM")
    auto, kept = AutoTokenizer.from_pretrained(own.root / "model"), held(Cache.open(own.cache))
    losses = []
    for index in rows.select("test"):
        read = kept[rows.row_ids[int(index)].as_py()].token_ids
        assert read is not None
        true = torch.tensor(auto(rows.texts[int(index)].as_py())["input_ids"])
        at = torch.from_numpy(read == MASK)
        with torch.inference_mode():
            logits = model(input_ids=torch.from_numpy(read.astype(np.int64))[None]).logits[0, at, : len(auto)]
        losses.append(torch.nn.functional.cross_entropy(logits, true[at], reduction="none"))
    assert record["task"] == "masked-lm"
    expected = torch.cat(losses).mean().item()
    assert record["reading"]["test"]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_that_cannot_fill_masks_is_refused(own: Project) -> None:
    with pytest.raises(TeacherError, match="taken as they are"):
        own.make_teacher(train={})
    encoders.write(own.root / "headless", "token-classification")
    with pytest.raises(
        TeacherError, match=r"not a trained model for AutoModelForMaskedLM: its weights lack cls\.predictions"
    ):
        own.make_teacher(model=str(own.root / "headless"))
    path = own.root / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mask_token": None}))
    with pytest.raises(TeacherError, match="no mask_token"):
        own.make_teacher()


def test_rows_longer_than_the_models_positions_are_refused_before_the_capture(own: Project) -> None:
    with (own.root / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": "film " * 40}) + "\n")
    own.prepare()
    with pytest.raises(TeacherError, match="cannot read rows of length 42"):
        own.make_teacher(max_length=64)


def test_a_row_of_nothing_that_may_be_masked_has_no_target(own: Project) -> None:
    with (own.root / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": "quite unknown"}) + "\n")
    own.prepare()
    assert own.capture().computed_rows == 1
    assert own.check()["rows"] == 61
    row = own.rows().row_ids[60].as_py()
    assert held(Cache.open(own.cache))[row].entries.counts.tolist() == [0] * 4


def test_the_teachers_row_of_the_report(own: Project) -> None:
    found = evaluate_teacher("tiny", Teacher(model="x", dataset="toy"), own.dataset, own.teacher)
    assert found["lm_loss"]["mean"] == teacher_record(own.teacher)["reading"]["test"]["loss"]
    write_json(found, own.root / "eval" / "teacher-tiny.json")
    summary = capture_summary(own.job(), own.capture())
    write_json(summary, own.root / "capture" / "toy.json")
    kinds_of_results = ("eval", "capture", "models", "export")
    build_report(*(own.root / name for name in kinds_of_results), own.root / "index.html")
    assert "teacher-tiny" in (own.root / "index.html").read_text()


def test_a_run_over_such_a_cache_is_refused_with_the_tasks_that_can_be(own: Project) -> None:
    own.root.joinpath("verified.json").write_text(json.dumps(own.check()))
    paths = RunInputs(own.cache, own.dataset, own.root / "verified.json", own.root / "out")
    entry = Run(dataset="toy", cache="toy", student="fc", recipe="kd")
    with pytest.raises(SpecMismatch, match=r"spec\.task +masked-lm") as refused:
        train_run("masked", entry, FCStudent(kind="fc"), Recipe(), paths, Workers(seeds_at_once=1))
    assert "sequence-classification" in str(refused.value)
    assert not (own.root / "out").exists()
