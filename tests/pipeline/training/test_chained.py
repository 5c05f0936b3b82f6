"""Runs that start from the students of another run: their weights, their tokenizer, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.load import load_params
from pipeline.config.params import Workers
from pipeline.config.students import FCStudent
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.export.export_run import export_run
from pipeline.students.registry import load_student
from pipeline.training.job import Job
from pipeline.training.loop import fit
from pipeline.training.run import train_run
from pipeline.training.seed import train_seed
from storage.errors import AssetError, ConfigError, SpecMismatch
from tests import toy
from tests.pipeline.conftest import World


def train(world: World, out: Path, init: Path | None = None, student: Any = None, **run: Any) -> Any:
    params = world.params
    entry = params.runs["fc-ce"].model_copy(update=run)
    paths = world.run_paths(out)._replace(init=init)
    chosen = student or params.students["fc"]
    return train_run(out.name, entry, chosen, params.recipes["ce"], paths, Workers(seeds_at_once=2))


@pytest.fixture(scope="module")
def before(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "before"
    train(world, out)
    return out


@pytest.mark.parametrize(("seed", "from_seed"), [(1, 1), (0, 0)])
def test_a_seed_starts_from_the_weights_of_the_same_seed(
    before: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, from_seed: int
) -> None:
    started: list[dict[str, torch.Tensor]] = []
    real = fit

    def look(model: torch.nn.Module, *rest: Any) -> Any:
        started.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return real(model, *rest)

    monkeypatch.setattr("pipeline.training.seed.fit", look)
    params, paths = world.params, world.run_paths(tmp_path)._replace(init=before)
    shutil.copytree(before / "tokenizer", tmp_path / "tokenizer")
    train_seed(Job(seed, 1, params.students["fc"], params.recipes["ce"], paths))
    wanted = load_file(before / f"seed-{from_seed}" / "model.safetensors")
    assert all(torch.equal(started[0][name], wanted[name]) for name in wanted)
    load_student(tmp_path / f"seed-{seed}")


def test_the_record_says_where_each_seed_started_and_one_seed_starts_many(
    before: Path, world: World, tmp_path: Path
) -> None:
    record = train(world, tmp_path / "after", before)
    assert [seed["started_from"] for seed in record["seeds"]] == ["before/seed-0", "before/seed-1"]
    one = tmp_path / "one"
    train(world, one, seeds=(3,))
    record = train(world, tmp_path / "many", one)
    assert [seed["started_from"] for seed in record["seeds"]] == ["one/seed-3", "one/seed-3"]


def test_a_learned_tokenizer_is_taken_along_and_not_learned_again(world: World, tmp_path: Path) -> None:
    student = FCStudent(kind="fc", embedding=4, hidden=4, tokenizer=40)
    train(world, tmp_path / "own", student=student)
    changed = tmp_path / "own" / "tokenizer" / "tokenizer.json"
    changed.write_text(changed.read_text().replace('"good"', '"gold"'))
    train(world, tmp_path / "after", tmp_path / "own", student)
    assert (tmp_path / "after" / "tokenizer" / "tokenizer.json").read_bytes() == changed.read_bytes()


def test_a_run_that_has_not_ended_is_no_start_and_has_no_results(
    before: Path, world: World, tmp_path: Path
) -> None:
    params, killed, exported = world.params, tmp_path / "killed", tmp_path / "exported"
    shutil.copytree(before, killed)
    (killed / "training.json").unlink()
    exported.mkdir()
    (exported / "model.onnx").touch()
    for use in (
        lambda: train(world, tmp_path / "after", killed),
        lambda: evaluate_run(
            "killed", params.runs["fc-ce"], params.students["fc"], world.run_paths(killed)
        ),
        lambda: export_run(
            "killed", params.runs["fc-ce"], params.students["fc"], params.export, world.run_paths(killed),
            exported,
        ),
    ):  # fmt: skip
        with pytest.raises(AssetError, match=r"killed has no training\.json.*\n.*dvc repro train@killed"):
            use()
    assert (exported / "model.onnx").exists()


def test_students_of_another_shape_classes_or_tokenizer_are_no_start(
    before: Path, world: World, tmp_path: Path
) -> None:
    wide = world.params.students["fc"].model_copy(update={"hidden": 9})
    with pytest.raises(SpecMismatch, match=r"not a start for chained\.after") as refused:
        train(world, tmp_path / "after", before, wide)
    assert [m.field for m in refused.value.mismatches] == ["student"]
    other = tmp_path / "other"
    shutil.copytree(before, other)
    for path in other.glob("seed-*/student.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_labels": 5}))
    words = other / "tokenizer" / "tokenizer.json"
    words.write_text(words.read_text().replace('"good"', '"gold"'))
    with pytest.raises(SpecMismatch, match=r"not a start for chained\.after") as refused:
        train(world, tmp_path / "after", other)
    assert [m.field for m in refused.value.mismatches] == ["num_labels", "tokenizer.content"]
    assert not (tmp_path / "after").exists()


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"init": "fc-c"}, "chained.b.init: no 'fc-c' in runs or chained; did you mean 'fc-ce'?"),
        ({"init": "b"}, "chained.b.init: circular, b <- b"),
        ({"student": "bilstm"}, "chained.b.student: found 'bilstm', but fc-ce trains 'fc'"),
        ({"seeds": [0, 7]}, "chained.b.seeds: fc-ce has [0, 1], not [7]"),
        ({}, None),
    ],
)
def test_chains_that_cannot_be_are_refused(tmp_path: Path, entry: dict[str, Any], line: str | None) -> None:
    shelves = toy.params()
    shelves["students"]["bilstm"] = {"kind": "bilstm"}
    run = {**shelves["runs"]["fc-ce"], "init": "fc-ce"}
    toy.write_params(tmp_path, shelves | {"chained": {"b": run | entry}})
    if line is None:
        assert load_params(tmp_path / "params.yaml").every_run["b"].seeds == (0, 1)
        return
    with pytest.raises(ConfigError) as refused:
        load_params(tmp_path / "params.yaml")
    assert line in str(refused.value)


def test_a_name_on_both_shelves_and_a_circle_of_runs_are_refused(tmp_path: Path) -> None:
    shelves = toy.params()
    run = shelves["runs"]["fc-ce"]
    chained = {"fc-ce": {**run, "init": "b"}, "b": {**run, "init": "c"}, "c": {**run, "init": "b"}}
    toy.write_params(tmp_path, shelves | {"chained": chained})
    with pytest.raises(ConfigError) as refused:
        load_params(tmp_path / "params.yaml")
    assert "chained.fc-ce: runs has this name too" in str(refused.value)
    assert "chained.c.init: circular, c <- b <- c" in str(refused.value)
