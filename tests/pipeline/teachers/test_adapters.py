"""Teachers by adapters: they and the head alone train; merged, they are a model like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.config.teachers import Lora, Teacher, TeacherTraining
from pipeline.engines.loading import load_classifier
from pipeline.teachers.adapters import merge_adapters, with_adapters
from pipeline.teachers.prepare import prepare_teacher
from storage.errors import TeacherError
from storage.writer import Store
from tests.pipeline.conftest import World

SHORT: dict[str, Any] = {"epochs": 1, "batch_rows": 16, "learning_rate": 1e-2}


def tuned(world: World, out: Path, **lora: Any) -> dict[str, Any]:
    """The record of a teacher that was trained by adapters into `out`."""
    train = TeacherTraining.model_validate({**SHORT, "lora": lora})
    entry: Teacher = world.params.teachers["tiny"].model_copy(update={"train": train})
    return prepare_teacher("tiny", entry, world.dataset, out)


def filled(world: World, **lora: Any) -> Any:
    """The toy with adapters that are not zero."""
    made = with_adapters("tiny", load_classifier(world.root / "model"), Lora.model_validate(lora))
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.mark.parametrize(
    ("targets", "moved"),
    [("auto", ("query", "value")), (["key", "dense"], ("key", "dense"))],
)
def test_adapters_and_the_head_train_and_nothing_else(world: World, targets: Any, moved: Any) -> None:
    made = filled(world, targets=targets)
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trained
    for name in trained:
        part = name.removesuffix(".lora_A.default.weight").removesuffix(".lora_B.default.weight")
        assert ".classifier." in name or (part != name and part.rpartition(".")[2] in moved), name
    assert {name for name in trained if ".classifier." in name} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


@torch.inference_mode()
def test_the_merged_model_gives_the_logits_of_the_model_with_its_adapters(world: World) -> None:
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    made = filled(world, rank=4, alpha=6.0, dropout=0.5)
    plain = load_classifier(world.root / "model")(input_ids=ids).logits
    with_adapters = made(input_ids=ids).logits
    layer = made.base_model.model.bert.encoder.layer[1].attention.self.query
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 6 / 4 * b @ a
    merged = merge_adapters(made)
    assert torch.allclose(merged.bert.encoder.layer[1].attention.self.query.weight, expected, atol=1e-6)
    assert torch.allclose(merged(input_ids=ids).logits, with_adapters, atol=1e-6)
    assert not torch.allclose(plain, with_adapters, atol=1e-4)
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} <= {"transformers", "torch"}


def test_a_teacher_by_adapters_is_a_teacher_like_any_other(world: World, tmp_path: Path) -> None:
    record = tuned(world, tmp_path / "teacher", rank=2)
    assert record["lora"] == {"rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": "auto"}
    assert json.loads((tmp_path / "teacher" / "teacher.json").read_text()) == record
    before = load_file(world.root / "model" / "model.safetensors")
    after = load_file(tmp_path / "teacher" / "model.safetensors")
    assert set(after) == set(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {f"bert.encoder.layer.{i}.attention.self.{p}.weight" for i in (0, 1) for p in ("query", "value")}
    assert moved == layers | {"classifier.weight", "classifier.bias"}
    for name in layers:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2
    store, cache = Store(tmp_path / "store"), tmp_path / "cache"
    capture_cache(CaptureJob("toy", world.entry(), world.dataset, tmp_path / "teacher", cache, store))


def test_layers_that_the_model_has_not_are_refused_with_the_nearest(world: World, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no linear layer 'querry'; did you mean 'query'\?"):
        tuned(world, tmp_path / "teacher", targets=["value", "querry"])
    with pytest.raises(TeacherError, match="no linear layer 'classifier'"):  # it trains as it is
        tuned(world, tmp_path / "teacher", targets=["classifier"])


def test_a_kind_without_default_layers_must_name_them(world: World) -> None:
    model = load_classifier(world.root / "model")
    model.config.model_type = "burt"
    with pytest.raises(TeacherError, match=r"no default for a burt\.(.|\n)*dense, key, query, value"):
        with_adapters("tiny", model, Lora())


def test_adapters_and_frozen_layers_are_one_too_many() -> None:
    with pytest.raises(ValidationError, match="remove frozen_layers"):
        TeacherTraining(lora=Lora(), frozen_layers=1)
