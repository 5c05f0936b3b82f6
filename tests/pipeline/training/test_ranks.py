"""Two real processes of torchrun: each step's gradients are those of one process, and a run is one run."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pipeline.config.load import load_params
from pipeline.config.params import Workers
from pipeline.config.recipes import Recipe
from pipeline.training.checks import check_ranks
from pipeline.training.run import train_run
from storage.errors import ConfigError
from tests import toy, warm
from tests.pipeline import crew, gradients
from tests.pipeline.conftest import World
from tests.pipeline.prose import Prose
from tests.pipeline.training.test_resume import project

pytestmark = pytest.mark.usefixtures("warm_processes")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def ran(world: World, prose: Prose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left their gradients, and below project/ a run that they trained."""
    out = tmp_path_factory.mktemp("ran")
    root = out / "project"
    root.mkdir()
    shelves = project(world, root)
    shelves["students"]["dropped"] = shelves["students"]["fc"] | {"dropout": 0.2}
    shelves["students"]["fc"]["dropout"] = 0.0
    shelves["recipes"]["long"] |= {"epochs": 2, "alpha": 0.3}
    shelves["runs"]["long"]["seeds"] = [0, 1]
    shelves["runs"]["dropped"] = shelves["runs"]["long"] | {"student": "dropped", "seeds": [0]}
    toy.write_params(root, shelves)
    paths = [str(path) for path in (world.root, prose.root, out, root)]
    done = subprocess.run(
        [warm.python(), *TORCHRUN, "-m", "tests.pipeline.gradients", *paths], cwd=root, env=environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_two_processes_have_the_gradients_and_losses_of_one_with_the_whole_batch(
    world: World, prose: Prose, ran: Path, tmp_path: Path
) -> None:
    """Batches of seven rows are unevenly shared, and so are labels: only some rows have one."""
    gradients.measure(world.root, prose.root, tmp_path)
    for kind in ("fc", "llama"):
        alone = load_file(tmp_path / f"{kind}-0-of-1.safetensors")
        assert len(alone) > 20
        for rank in (0, 1):
            shared = load_file(ran / f"{kind}-{rank}-of-2.safetensors")
            assert shared.keys() == alone.keys()
            for name, expected in alone.items():
                assert np.allclose(shared[name], expected, rtol=1e-4, atol=1e-6), (kind, rank, name)


def test_a_run_in_two_processes_is_that_of_one_up_to_rounding(
    world: World, ran: Path, tmp_path: Path
) -> None:
    root = ran / "project"
    params = load_params(root / "params.yaml")
    alone = train_run(
        "long", params.runs["long"], params.students["fc"], params.recipes["long"],
        world.run_paths(tmp_path / "alone"), Workers(seeds_at_once=1),
    )  # fmt: skip
    shared = json.loads((root / "models" / "long" / "training.json").read_text())
    assert [seed["seed"] for seed in shared["seeds"]] == [0, 1]
    for own, expected in zip(shared["seeds"], alone["seeds"], strict=True):
        assert (own["rows_seen"], own["steps"]) == (expected["rows_seen"], expected["steps"])
        for point, other in zip(own["curve"], expected["curve"], strict=True):
            assert point == pytest.approx(other, rel=1e-3)
    for seed in (0, 1):
        name = f"seed-{seed}/model.safetensors"
        one, two = load_file(tmp_path / "alone" / name), load_file(root / "models" / "long" / name)
        assert all(np.allclose(one[key], two[key], atol=1e-3) for key in one)
    assert (root / "results" / "curves" / "long.csv").is_file()
    assert not (root / ".stillroom" / "training" / "long").exists()


def test_two_processes_that_are_killed_go_on_to_the_same_bits(ran: Path, tmp_path: Path) -> None:
    """Each has random numbers of its own: dropout draws from them."""
    calm, root = ran / "project", tmp_path / "project"
    shutil.copytree(calm, root, symlinks=True, ignore=shutil.ignore_patterns("models", "results"))
    command = [warm.python(), *TORCHRUN, "-m", "stages.train", "dropped"]
    kept = root / ".stillroom/training/dropped"
    with subprocess.Popen(command, cwd=root, env=environment(), stderr=subprocess.DEVNULL) as running:
        crew.wait_for(lambda: steps_of(kept / "seed-0.safetensors") > 3 or running.poll() is not None, 120)
        warm.kill(running.pid)
    assert running.returncode == -signal.SIGKILL
    before = steps_of(kept / "seed-0.safetensors")
    done = subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "starts again" not in done.stderr
    own, expected = (
        json.loads((place / "models/dropped/training.json").read_text())["seeds"][0] for place in (root, calm)
    )
    assert 3 < before < expected["steps"]
    assert [point["train_loss"] for point in own["curve"]] == [p["train_loss"] for p in expected["curve"]]
    weights = "models/dropped/seed-0/model.safetensors"
    assert (root / weights).read_bytes() == (calm / weights).read_bytes()


def environment() -> dict[str, str]:
    """What torchrun and its ranks find: the code of this checkout, one thread, the interpreter."""
    return os.environ | {"PYTHONPATH": str(toy.ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": warm.python()}


def steps_of(checkpoint: Path) -> int:
    if not checkpoint.is_file():
        return 0
    with safe_open(checkpoint, "pt") as file:
        return int(json.loads(file.metadata()["numbers"]).get("steps", 0))


def test_a_recipe_whose_loss_is_no_sum_over_rows_is_refused_in_several_processes() -> None:
    matching = Recipe.model_validate({"match": {"states": {"map": [[1, 1]]}}})
    with pytest.raises(ConfigError, match="found 2 processes, expected one"):
        check_ranks("x", matching, 2)
    check_ranks("x", Recipe(), 2)
