"""A training that is killed at any step goes on to the same bits, twice in a row, or says why not."""

import json
import multiprocessing as mp
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.config.params import Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent
from pipeline.training import seed
from pipeline.training.job import Job, TrainedSeed
from pipeline.training.processes import start_importing
from pipeline.training.resume import deciding_facts
from pipeline.training.run import train_run, write_student_tokenizer
from pipeline.training.seed import train_seed
from storage import Cache
from tests import toy, warm
from tests.pipeline import row_worlds
from tests.pipeline.conftest import World
from tests.pipeline.prose import Prose
from tests.pipeline.training.test_language_students import recipe as language_recipe
from tests.pipeline.training.test_language_students import student as language_student
from tests.pipeline.training.test_multitask import EMBEDDING, both

TIMED = ("seconds", "targets_per_second", "waiting")
STUDENT = FCStudent(kind="fc", embedding=8, hidden=8, dropout=0.3)
RECIPE = Recipe(
    alpha=0.5, temperature=2.0, epochs=3, batch_rows=16, pool=True, evaluations_per_epoch=2, patience=99
)
NAME = "seed-1.safetensors"


def job(world: World, out: Path, recipe: Recipe = RECIPE, **changes: Any) -> Job:
    """Seed 1 of a run with a checkpoint after every step, its tokenizer made."""
    paths = world.run_paths(out)._replace(checkpoints=out.parent / f"{out.name}-kept")
    made = Job(1, 1, STUDENT, recipe, paths, None, 1, 0.0)._replace(**changes)
    if not (out / "tokenizer").exists():
        write_student_tokenizer(made.student, Cache.open(world.cache), world.rows(), out / "tokenizer")
    return made


def job_of_prose(prose: Prose, out: Path) -> Job:
    paths = World(prose.root).run_paths(out)._replace(checkpoints=out.parent / f"{out.name}-kept")
    entry = language_student(max_length=9)
    shutil.copytree(Cache.open(prose.cache).tokenizer_dir, out / "tokenizer", dirs_exist_ok=True)
    return Job(1, 1, entry, language_recipe(epochs=2), paths, None, 1, 0.0)


def train_until(job: Job, targets: int) -> None:
    """In a process of its own: train, and be killed when so many targets are done, earlier ones included."""
    told: list[int] = []

    def tell(more: int) -> None:
        told.append(more)
        if sum(told[1:]) >= targets:
            os.kill(os.getpid(), signal.SIGKILL)

    train_seed(job, tell, 0)


def killed(job: Job, targets: int) -> None:
    start_importing()
    process = mp.get_context("forkserver").Process(target=train_until, args=(job, targets))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def outcome(job: Job, done: TrainedSeed) -> tuple[dict[str, Any], bytes]:
    """(all that was measured, the bytes of the student)."""
    fit = {key: value for key, value in done.fit._asdict().items() if key not in TIMED}
    return fit, (job.paths.out / f"seed-{job.seed}" / "model.safetensors").read_bytes()


def step_of(job: Job) -> int:
    """Where the checkpoint was taken."""
    assert job.paths.checkpoints is not None
    with safe_open(job.paths.checkpoints / NAME, "pt") as file:
        return int(json.loads(file.metadata()["numbers"])["steps"])


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_killed_at_two_random_steps_a_training_ends_in_the_same_bits(
    world: World, tmp_path: Path, draw: int
) -> None:
    calm = job(world, tmp_path / "calm", checkpoint_minutes=None)
    expected = outcome(calm, train_seed(calm))
    targets = expected[0]["rows_seen"]
    first, second = sorted(random.Random(draw).sample(range(20, targets), 2))
    own = job(world, tmp_path / "killed")
    killed(own, first)
    before = step_of(own)
    killed(own, second)
    assert 0 < before <= step_of(own) < expected[0]["steps"]
    told: list[int] = []
    assert outcome(own, train_seed(own, told.append, 0)) == expected
    assert sum(told[1:]) == targets, "what was done before is told too"


def test_a_language_model_that_is_killed_twice_ends_in_the_same_bits(prose: Prose, tmp_path: Path) -> None:
    calm = job_of_prose(prose, tmp_path / "calm")._replace(checkpoint_minutes=None)
    done = train_seed(calm)
    expected = outcome(calm, done)
    own = job_of_prose(prose, tmp_path / "killed")
    targets: list[int] = []
    killed(own, 200)
    killed(own, 700)
    again = train_seed(own, targets.append, 0)
    assert targets[0] > 700
    assert outcome(own, again) == expected
    assert again.setup["threads"] == done.setup["threads"]


def test_a_student_of_several_tasks_that_is_killed_twice_ends_in_the_same_bits(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "vectors").mkdir()
    vectors = row_worlds.vectors(tmp_path / "vectors", **EMBEDDING).all_of_it()

    def own_job(out: Path, minutes: float | None) -> Job:
        parts = both(world, vectors, out)
        kept = {
            task: part._replace(paths=part.paths._replace(checkpoints=tmp_path / f"{out.name}-kept"))
            for task, part in parts.items()
        }
        first = kept["mood"]
        return job(world, out, first.recipe, paths=first.paths, checkpoint_minutes=minutes, parts=kept)

    calm = own_job(tmp_path / "calm", None)
    done = train_seed(calm)
    targets = done.fit.rows_seen
    own = own_job(tmp_path / "killed", 0.0)
    killed(own, targets // 3)
    killed(own, 4 * targets // 5)  # the shorter task is in a later round by then
    again = train_seed(own)
    assert outcome(own, again) == outcome(calm, done)
    assert again.setup["tasks"] == done.setup["tasks"]
    heavier = {task: part._replace(weight=9.0) for task, part in own.parts.items() if task == "mood"}
    assert deciding_facts(own) != deciding_facts(own._replace(parts={**own.parts, **heavier}))


def test_how_a_language_model_is_run_is_kept_and_not_tried_again(
    prose: Prose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = job_of_prose(prose, tmp_path / "killed")
    killed(own, 200)
    monkeypatch.setattr(seed, "fastest_setup", lambda *_: pytest.fail("it was tried again"))
    assert train_seed(own).setup["seconds_per_step"]


def test_a_checkpoint_that_is_some_steps_old_gives_the_same_bits(world: World, tmp_path: Path) -> None:
    calm = job(world, tmp_path / "calm", checkpoint_minutes=None)
    expected = outcome(calm, train_seed(calm))
    own = job(world, tmp_path / "killed")
    killed(own, 60)
    assert own.paths.checkpoints is not None
    old = (own.paths.checkpoints / NAME).read_bytes()
    killed(own, 300)
    (own.paths.checkpoints / NAME).write_bytes(old)
    assert outcome(own, train_seed(own)) == expected


def test_a_finished_seed_is_not_trained_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = job(world, tmp_path / "done")
    expected = outcome(own, train_seed(own))
    shutil.rmtree(own.paths.out / "seed-1")  # as DVC does
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: pytest.fail("it is trained again"))
    assert outcome(own, train_seed(own)) == expected


@pytest.mark.parametrize("damage", ["truncated", "flipped", "header", "empty"])
def test_a_damaged_checkpoint_is_named_and_training_starts_anew(
    world: World, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = job(world, tmp_path / "calm", checkpoint_minutes=None)
    expected = outcome(calm, train_seed(calm))
    own = job(world, tmp_path / "own")
    killed(own, 100)
    assert own.paths.checkpoints is not None
    path = own.paths.checkpoints / NAME
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        raw = raw[: len(raw) // 2]
    elif damage == "flipped":
        raw[-40] ^= 1
    elif damage == "header":
        raw = raw.replace(b'\\"steps\\": ', b'\\"steps\\":1', 1)
    else:
        raw = bytearray()
    path.write_bytes(raw)
    told: list[int] = []
    assert outcome(own, train_seed(own, told.append, 0)) == expected
    assert told[1] <= 16, "no step was done before"
    assert f"{NAME} is damaged" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize("what", ["recipe", "student", "dataset", "seed", "code"])
def test_a_checkpoint_of_another_training_is_named_and_not_used(
    world: World,
    tmp_path: Path,
    what: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = job(world, tmp_path / "own")
    killed(own, 100)
    changed = own
    if what == "recipe":
        changed = own._replace(recipe=RECIPE.model_copy(update={"alpha": 0.6}))
    elif what == "student":
        changed = own._replace(student=STUDENT.model_copy(update={"learning_rate": 1e-2}))
    elif what == "dataset":
        shutil.copytree(world.dataset, tmp_path / world.dataset.name)
        (tmp_path / world.dataset.name / "more").write_text("a row was mended")
        changed = own._replace(paths=own.paths._replace(dataset=tmp_path / world.dataset.name))
    elif what == "seed":
        assert own.paths.checkpoints is not None
        shutil.copy(own.paths.checkpoints / NAME, own.paths.checkpoints / "seed-2.safetensors")
        changed = own._replace(seed=2)
    else:
        monkeypatch.setattr("pipeline.training.resume.CODE", ("pipeline",))
    told: list[int] = []
    train_seed(changed, told.append, 0)
    assert told[1] <= 16, "no step was done before"
    assert f"is of another {what}; training" in capsys.readouterr().err.replace("\n", "")


def test_a_checkpoint_that_cannot_be_written_is_named_and_training_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = job(world, tmp_path / "calm", checkpoint_minutes=None)
    expected = outcome(calm, train_seed(calm))
    own = job(world, tmp_path / "own")
    assert own.paths.checkpoints is not None
    own.paths.checkpoints.write_text("a file stands where the directory should be")
    assert outcome(own, train_seed(own)) == expected
    assert "could not be written" in capsys.readouterr().err


def test_without_a_setting_nothing_is_written_down(world: World, tmp_path: Path) -> None:
    own = job(world, tmp_path / "own", checkpoint_minutes=None)
    train_seed(own)
    assert own.paths.checkpoints is not None
    assert not own.paths.checkpoints.exists()


def project(world: World, root: Path) -> dict[str, Any]:
    """A directory as `stages.train` expects it, over the world's data and cache."""
    shelves = toy.params()
    shelves["recipes"]["long"] = {"alpha": 0.5, "epochs": 20, "batch_rows": 16, "pool": True, "patience": 999}
    shelves["runs"]["long"] = {
        "dataset": "toy", "cache": "toy", "student": "fc", "recipe": "long", "seeds": [0, 1, 2]
    }  # fmt: skip
    shelves["workers"] = {"seeds_at_once": 1, "checkpoint_minutes": 0.0}
    toy.write_params(root, shelves)
    for name, source in (("data", world.dataset), ("caches", world.cache)):
        (root / name).mkdir()
        (root / name / "toy").symlink_to(source)
    (root / "verified").mkdir()
    shutil.copy(world.verified, root / "verified" / "toy.json")
    return shelves


@pytest.mark.usefixtures("warm_processes")
def test_a_killed_run_keeps_its_finished_seeds_and_cleans_up_when_it_is_done(
    world: World, tmp_path: Path
) -> None:
    root = tmp_path / "project"
    root.mkdir()
    project(world, root)
    environment = os.environ | {"PYTHONPATH": str(toy.ROOT)}
    command = [warm.python(), "-m", "stages.train", "long"]
    kept = root / ".stillroom" / "training" / "long"
    with subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + 120
        while not (kept / "seed-1.safetensors").exists():
            assert running.poll() is None, "it ended before the moment came"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        warm.kill(running.pid)
    finished = load_file(kept / "seed-0.safetensors")
    assert all(name.startswith("best.") for name in finished), "the first seed was done"
    before = (kept / "seed-0.safetensors").stat().st_mtime_ns
    shutil.rmtree(root / "models")  # as DVC does
    os.link(kept / "seed-0.safetensors", root / "first")
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (root / "first").stat().st_mtime_ns == before
    assert (root / "first").stat().st_nlink == 1, "its name is gone, with all of the run's"
    assert not kept.exists()
    record = json.loads((root / "models" / "long" / "training.json").read_text())
    calm = train_run(
        "long", *_entries(root), world.run_paths(tmp_path / "calm" / "long"), Workers(seeds_at_once=2)
    )
    strip = lambda seed: {k: v for k, v in seed.items() if k not in TIMED}  # noqa: E731
    assert [strip(seed) for seed in record["seeds"]] == [strip(seed) for seed in calm["seeds"]]
    for number in (0, 1, 2):
        name = f"long/seed-{number}/model.safetensors"
        assert (root / "models" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def _entries(root: Path) -> tuple[Any, Any, Any]:
    from pipeline.config.load import load_params

    params = load_params(root / "params.yaml")
    run = params.runs["long"]
    return run, params.students[run.student], params.recipes[run.recipe]
