"""Runs: seeds in real processes, the same bits however many run at once, refusals before the first step."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.params import Workers
from pipeline.config.students import FCStudent
from pipeline.data.prepare import prepare_dataset
from pipeline.data.rows import POOL
from pipeline.data.tokenizer import TextReader
from pipeline.evaluation import latency
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.evaluation.teachers import evaluate_teacher
from pipeline.streaming.verified import open_inputs
from pipeline.teachers.record import RECORD, teacher_record
from pipeline.training import processes
from pipeline.training.job import Job, write_curve
from pipeline.training.processes import _start
from pipeline.training.run import train_run, write_student_tokenizer
from pipeline.training.seed import train_seed
from storage import Cache
from storage.errors import DataError, SpecMismatch, TrainingError
from tests.pipeline.conftest import World


def train(
    world: World, out: Path, name: str = "fc-kd-pool", at_once: int = 2, **student: Any
) -> dict[str, Any]:
    params = world.params
    run = params.runs[name]
    changed = params.students[run.student].model_copy(update=student)
    paths = world.run_paths(out)
    return train_run(name, run, changed, params.recipes[run.recipe], paths, Workers(seeds_at_once=at_once))


def untimed(record: dict[str, Any]) -> list[dict[str, Any]]:
    timed = ("seconds", "targets_per_second", "waiting")
    return [{key: value for key, value in seed.items() if key not in timed} for seed in record["seeds"]]


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fc-kd-pool"
    train(world, out)
    return out


def test_the_record_of_a_run_tells_of_every_seed(trained: Path, world: World) -> None:
    record = json.loads((trained / "training.json").read_text())
    rows = world.rows()
    num = len(rows.select("train", POOL))
    assert record["family"] == "KD + extra text"
    assert [seed["seed"] for seed in record["seeds"]] == [0, 1]
    for seed in record["seeds"]:
        assert seed["rows_seen"] == seed["teacher_rows_seen"] == 2 * num
        assert seed["cut_rows"] == 0
        assert seed["curve"][-1]["rows"] == seed["rows_seen"]
        assert seed["best_accuracy"] == max(point["validation_accuracy"] for point in seed["curve"])
    names = sorted(path.name for path in trained.iterdir())
    assert names == ["seed-0", "seed-1", "tokenizer", "training.json"]
    first, second = ((trained / f"seed-{n}" / "model.safetensors").read_bytes() for n in (0, 1))
    assert first != second


def test_a_seed_gives_the_same_bits_alone_and_beside_others(
    trained: Path, world: World, tmp_path: Path
) -> None:
    record = train(world, tmp_path / "alone", at_once=1)
    assert untimed(record) == untimed(json.loads((trained / "training.json").read_text()))
    for seed in (0, 1):
        name = f"seed-{seed}/model.safetensors"
        assert (tmp_path / "alone" / name).read_bytes() == (trained / name).read_bytes()


def test_what_was_drawn_before_in_a_process_does_not_change_a_seed(
    trained: Path, world: World, tmp_path: Path
) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    torch.rand(7)
    params = world.params
    student, recipe = params.students["fc"], params.recipes["kd-pool"]
    train_seed(Job(1, 1, student, recipe, world.run_paths(tmp_path)))
    name = "seed-1/model.safetensors"
    assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_labels_only_sees_no_row_of_the_teacher_and_no_pool(world: World, tmp_path: Path) -> None:
    (tmp_path / "ce").mkdir()
    (tmp_path / "ce" / "stale").write_text("from an earlier run")
    record = train(world, tmp_path / "ce", "fc-ce")
    assert [seed["teacher_rows_seen"] for seed in record["seeds"]] == [0, 0]
    assert record["seeds"][0]["rows_seen"] == 2 * len(world.rows().select("train"))
    assert not (tmp_path / "ce" / "stale").exists()


def test_a_cache_that_was_not_verified_is_refused(world: World, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "own")
    own.verified.unlink()
    with pytest.raises(SpecMismatch, match="is not the cache that was verified") as refused:
        train(own, tmp_path / "out")
    assert f"dvc repro verify@{own.verified.stem}" in str(refused.value)
    own.verified.write_text(json.dumps({"manifest": "0" * 64}))
    with pytest.raises(SpecMismatch, match="is not the cache that was verified"):
        train(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_a_pool_needs_a_dataset_with_one(world: World, tmp_path: Path) -> None:
    own = world.copy(tmp_path / "own")
    prepare_dataset("toy", own.params.datasets["toy"].model_copy(update={"pool": None}), own.dataset)
    with pytest.raises(DataError, match="the dataset has none"):
        train(own, tmp_path / "out")


def test_a_student_that_diverges_is_one_error_with_run_and_seed(world: World, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"runs\.fc-kd-pool, seed [01]: the .* loss is .* at step"
    ) as said:
        train(world, tmp_path / "out", learning_rate=1e30)
    assert "in the process of seed" in str(said.value.__cause__)


def test_a_process_that_is_killed_is_an_error_and_no_endless_wait(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = _start

    def killed(job: Job) -> Any:
        pipe, process = start(job)
        process.kill()
        return pipe, process

    monkeypatch.setattr(processes, "_start", killed)
    with pytest.raises(TrainingError, match=r"seed [01]: its process ended without a result"):
        train(world, tmp_path / "out")


def test_a_tokenizer_of_its_own_is_learned_from_training_and_pool_text_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(TextReader, "learn", lambda texts, *rest: seen.extend(texts))
    rows = world.rows()
    student = FCStudent(kind="fc", tokenizer=50)
    write_student_tokenizer(student, Cache.open(world.cache), rows, tmp_path / "tokenizer")
    held_out = set(rows.texts.take(rows.select("validation", "test")).to_pylist())
    assert len(seen) == len(rows.select("train", POOL))
    assert not held_out & set(seen)


def test_a_student_with_a_tokenizer_of_its_own_trains_and_counts_what_it_cuts(
    world: World, tmp_path: Path
) -> None:
    student = FCStudent(kind="fc", embedding=4, hidden=4, tokenizer=40, max_length=5)
    recipe = world.params.recipes["ce"]
    paths = world.run_paths(tmp_path / "out")
    cache, rows = open_inputs(paths)
    write_student_tokenizer(student, cache, rows, paths.out / "tokenizer")
    told: list[int] = []
    done = train_seed(Job(0, 1, student, recipe, paths), told.append, 0)
    assert done.cut_rows > 0
    assert told[0] == sum(told[1:]) == 2 * len(rows.select("train"))


def test_the_curve_is_the_mean_over_the_seeds_that_got_that_far(tmp_path: Path) -> None:
    def point(rows: int, accuracy: float) -> dict[str, float]:
        return {"rows": rows, "train_loss": 1.0, "validation_loss": 2.0, "validation_accuracy": accuracy}

    record = {"seeds": [{"curve": [point(10, 0.5), point(20, 0.7)]}, {"curve": [point(10, 0.6)]}]}
    write_curve(record, tmp_path / "deep" / "curve.csv")
    with (tmp_path / "deep" / "curve.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["rows"], row["seeds"], row["validation_accuracy"]) for row in found] == [
        ("10", "2", "0.55000"),
        ("20", "1", "0.70000"),
    ]


def test_a_run_is_evaluated_on_its_test_rows_over_all_seeds(
    trained: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "LATENCY_REPEATS", 2)
    run = world.params.runs["fc-kd-pool"]
    found = evaluate_run("fc-kd-pool", run, world.params.students["fc"], world.run_paths(trained))
    assert found["about"]["rows"] == len(world.rows().select("test"))
    assert tuple(found["about"][name] for name in ("kind", "teacher", "cache")) == ("run", "tiny", "toy")
    assert len(found["accuracy"]["values"]) == 2
    sums = [found[name]["mean"] for name in ("both_right", "only_student_right")]
    assert sum(sums) == pytest.approx(found["accuracy"]["mean"])
    assert found["latency_ms_batch_1"]["mean"] > 0
    json.dumps(found, allow_nan=False)


def test_a_teacher_agrees_with_itself_and_is_scored_by_the_names_of_its_outputs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "LATENCY_REPEATS", 2)
    entry = world.params.teachers["tiny"]
    found = evaluate_teacher("tiny", entry, world.dataset, world.teacher)
    score = teacher_record(world.teacher)["accuracy"]["test"]
    assert found["accuracy"]["mean"] == pytest.approx(score)
    assert found["agreement"]["mean"] == 1
    assert found["kl_to_teacher"]["mean"] == pytest.approx(0, abs=1e-9)
    own = world.copy(tmp_path / "own")
    record = own.teacher / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"labels": ["positive", "negative"]}))
    turned = evaluate_teacher("tiny", entry, own.dataset, own.teacher)
    assert turned["accuracy"]["mean"] == pytest.approx(1 - score)
