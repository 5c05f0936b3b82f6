"""docs/your-own-loop.md: every block runs, and every loop reaches the loss of the run at every step."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ruamel.yaml import YAML
from torch.nn.modules.module import register_module_forward_hook

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.capture.verify import verify_cache
from pipeline.config.load import load_params
from pipeline.config.params import Params, RunInputs, Workers
from pipeline.data.prepare import prepare_dataset
from pipeline.objectives.loss import DistillationLoss
from pipeline.runtime import hardware
from pipeline.streaming.verified import open_inputs
from pipeline.students.llama import Llama
from pipeline.students.transformers_classifier import Transformers
from pipeline.teachers.prepare import prepare_teacher
from pipeline.training import seed as seeds
from pipeline.training.job import Fit, Job
from pipeline.training.run import train_run, write_student_tokenizer
from pipeline.training.seed import train_seed
from storage import Cache
from storage.writer import Store
from tests import toy
from tests.imports import ROOT
from tests.pipeline.prose import write_language_model

PAGE = (ROOT / "docs" / "your-own-loop.md").read_text()
EVERY_STEP = {"evaluations_per_epoch": 100, "patience": 1000}  # so that the record has a loss for each step


def blocks(language: str) -> list[str]:
    """The code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


SETUP, PLAIN, ACCELERATE, TRAINER, LANGUAGE = blocks("python")


class Project(NamedTuple):
    """A project directory that holds what the page needs, and the losses of its two runs step by step."""

    root: Path
    reviews: list[float]
    prose: list[float]


def shelves(root: Path) -> dict[str, Any]:
    """params.yaml: what the page says, and a toy's data and teachers."""
    found: dict[str, Any] = {}
    for text in blocks("yaml"):
        for name, entries in YAML(typ="safe", pure=True).load(text).items():
            found[name] = found.get(name, {}) | entries
    split = {"train": 0.6, "validation": 0.2, "test": 0.2}
    labelled, pool = {"source": "labelled"}, {"where": {"source": "pool"}}
    return found | {
        "datasets": {
            "reviews": {
                "path": str(root / "reviews.csv"), "where": labelled, "labels": ["negative", "positive"],
                "split": split, "pool": pool,
            },
            "prose": {"task": "causal-lm", "path": str(root / "prose.jsonl"), "split": split},
        },
        "teachers": {
            "reviewer": {"model": str(root / "reviewer"), "dataset": "reviews", "max_length": 32},
            "author": {"model": str(root / "author"), "dataset": "prose", "max_length": 128},
        },
        "caches": {
            "reviews": {
                "dataset": "reviews", "teacher": "reviewer", "precision": "float32", "shard_rows": 32
            },
            "prose": {
                "dataset": "prose", "teacher": "author", "precision": "float32", "shard_rows": 16,
                "targets": {"codec": "threshold", "tau": 0.1, "layout": "compact"},
            },
        },
    }  # fmt: skip


def capture(root: Path, params: Params) -> None:
    """Everything before the train stage, where the stages of a project put it."""
    for name, entry in params.caches.items():
        data, teacher = root / "data" / name, root / "teachers" / entry.teacher
        prepare_dataset(name, params.datasets[name], data)
        prepare_teacher(entry.teacher, params.teachers[entry.teacher], data, teacher)
        out = root / "caches" / name
        capture_cache(CaptureJob(name, entry, data, teacher, out, Store(root / "store")))
        record = verify_cache(name, Cache.open(out), entry, data, teacher)
        (root / "verified").mkdir(exist_ok=True)
        (root / "verified" / f"{name}.json").write_text(json.dumps(record))


def first_weights(root: Path, name: str, params: Params) -> Fit:
    """Train the first seed of a run here, and save the weights that it starts from as transformers does."""
    run = params.runs[name]
    student, recipe = params.students[run.student], params.recipes[run.recipe].model_copy(update=EVERY_STEP)
    paths = inputs(root, name, params)
    write_student_tokenizer(student, *open_inputs(paths), paths.out / "tokenizer")
    fit = seeds.fit

    def fit_from_saved(model: torch.nn.Module, *arguments: Any) -> Fit:
        assert isinstance(model, Transformers | Llama)
        whole = model.net if isinstance(model, Transformers) else causal(model)
        whole.save_pretrained(root / ("start" if isinstance(model, Transformers) else "start-writer"))
        return fit(model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "fit", fit_from_saved)
        return train_seed(Job(0, 1, student, recipe, paths)).fit


def causal(model: Llama) -> Any:
    """The student as the language model that transformers knows."""
    from transformers import LlamaForCausalLM

    whole = LlamaForCausalLM(model.model.config)
    whole.model.load_state_dict(model.model.state_dict())
    return whole


def inputs(root: Path, name: str, params: Params) -> RunInputs:
    run = params.runs[name]
    verified = root / "verified" / f"{run.cache}.json"
    return RunInputs(
        root / "caches" / run.cache, root / "data" / run.dataset, verified, root / "models" / name
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    toy.write_csv(root / "reviews.csv")
    toy.write_model(root / "reviewer")
    lines = [json.dumps({"text": f"{a} {b}"}) for a, b in zip(toy.texts(60), toy.texts(60, 7), strict=True)]
    (root / "prose.jsonl").write_text("\n".join(lines) + "\n")
    write_language_model(root / "author")
    toy.write_params(root, shelves(root))
    params = load_params(root / "params.yaml")
    hardware.pin_threads(1)
    capture(root, params)
    here = first_weights(root, "reviews-small-kd", params)
    run = params.runs["reviews-small-kd"]
    recipe = params.recipes[run.recipe].model_copy(update=EVERY_STEP)
    student = params.students[run.student]
    paths = inputs(root, "reviews-small-kd", params)
    record = train_run("reviews-small-kd", run, student, recipe, paths, Workers(seeds_at_once=1))
    curve = record["seeds"][0]["curve"]  # of the stage, which trains in a process of its own
    assert [step["train_loss"] for step in curve] == [step["train_loss"] for step in here.curve]
    assert len(curve) == record["seeds"][0]["steps"] > 10
    prose = first_weights(root, "prose-writer-kd", params)
    assert len(prose.curve) == prose.steps > 10
    return Project(root, *([s["train_loss"] for s in found] for found in (curve, prose.curve)))


@pytest.fixture
def losses(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Every loss that a DistillationLoss computes, in the project's directory."""
    found: list[float] = []

    def record(module: torch.nn.Module, arguments: Any, value: torch.Tensor) -> None:
        if isinstance(module, DistillationLoss):
            found.append(value.item())

    linear = DistillationLoss.linear

    def recorded(*arguments: Any) -> torch.Tensor:
        found.append((value := linear(*arguments)).item())
        return value

    monkeypatch.chdir(project.root)
    monkeypatch.setattr(DistillationLoss, "linear", recorded)
    hook = register_module_forward_hook(record)
    hardware.pin_threads(1)
    yield found
    hook.remove()


def run(*code: str) -> dict[str, Any]:
    """Run blocks one after the other, as a program; return its names."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in code:
        exec(compile(block, "your-own-loop.md", "exec"), names)
    return names


@pytest.mark.parametrize("loop", [PLAIN, ACCELERATE], ids=["plain", "accelerate"])
def test_the_loop_has_the_loss_of_the_run_at_every_step(
    project: Project, losses: list[float], loop: str
) -> None:
    run(SETUP, loop)
    assert losses == project.reviews


def test_the_trainer_has_the_loss_of_the_run_at_every_step_and_continues_from_a_checkpoint(
    project: Project, losses: list[float]
) -> None:
    run(SETUP, TRAINER)
    assert losses == project.reviews
    losses.clear()
    run(SETUP, TRAINER.replace("trainer.train()", "trainer.train(resume_from_checkpoint='out/checkpoint-5')"))
    assert losses == project.reviews[5:]


def test_the_loop_of_a_language_model_has_the_loss_of_the_run_at_every_step(
    project: Project, losses: list[float]
) -> None:
    run(SETUP, LANGUAGE)
    assert losses == pytest.approx(project.prose, rel=1e-5)


def test_a_loop_continues_from_its_own_state(project: Project, losses: list[float]) -> None:
    """As the page says below its first loop."""
    stop = "        if len(seen) == 7:\n            raise KeyboardInterrupt\n"
    broken = PLAIN.replace("        targets, labels", stop + "        targets, labels").replace(
        "        value.backward()", "        seen.append(value)\n        value.backward()"
    )
    names: dict[str, Any] = {"seen": []}
    exec(compile(SETUP, "your-own-loop.md", "exec"), names)
    with pytest.raises(KeyboardInterrupt):
        exec(compile(broken, "your-own-loop.md", "exec"), names)
    state = names["data"].state_dict()
    state["batch"] -= 1  # the batch that was not used any more
    names["data"].load_state_dict(state)
    rest = PLAIN.replace("data, model, optimizer, schedule = prepare()\n", "").replace(
        "range(recipe.epochs)", "range(data.epoch, recipe.epochs)"
    )
    exec(compile(rest, "your-own-loop.md", "exec"), names)
    assert losses == project.reviews
