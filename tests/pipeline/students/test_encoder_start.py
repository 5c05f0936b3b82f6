"""Students of texts that start from their teacher: copied layers, embeddings in fewer dimensions, Xavier."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from pipeline.capture.verify import verify_cache
from pipeline.config.caches import Weights
from pipeline.config.params import Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student
from pipeline.engines.loading import load_classifier
from pipeline.students.bert_weights import BERT_EMBEDDINGS, bert_tensors, check_bert_start
from pipeline.students.initialise import factorise_embeddings
from pipeline.students.registry import build_student, load_student
from pipeline.training.run import train_run
from storage import Cache
from storage.errors import SpecMismatch, TeacherError
from storage.verify import verify
from tests import toy
from tests.pipeline.capture.test_capture import change_json
from tests.pipeline.conftest import World

TINY: dict[str, Any] = {"kind": "tinybert", "layers": 2, "width": toy.WIDTH, "heads": 2, "max_length": 32}
SMALL: dict[str, dict[str, Any]] = {
    "fc": {"kind": "fc", "embedding": 6, "hidden": 8},
    "bilstm": {"kind": "bilstm", "embedding": 6, "hidden": 8},
    "tinybert": {"kind": "tinybert", "layers": 1, "width": 6, "heads": 2, "max_length": 32},
}


def entry(**changes: Any) -> Any:
    made: Student = TypeAdapter(Student).validate_python({**TINY, **changes})
    return made


def write_model(directory: Path, **changes: Any) -> None:
    """The toy's BERT with blocks four times its width, and numbers that say something."""
    from transformers import BertConfig, BertForSequenceClassification

    toy.write_model(directory)
    torch.manual_seed(5)
    config = BertConfig.from_pretrained(directory, intermediate_size=4 * toy.WIDTH, **changes)
    config.initializer_range = 0.4
    BertForSequenceClassification(config).save_pretrained(directory)


class Own(World):
    """A world whose cache carries weights."""

    def carry(self, *layers: int) -> int:
        carried = Weights(layers=layers) if layers else None
        computed = self.capture(hidden=None, weights=carried).computed_rows
        self.verified.write_text(json.dumps({"manifest": Cache.open(self.cache).manifest_sha256}))
        return computed

    def run(self, student: Any, out: Path, learning_rate: float = 1e-12) -> torch.nn.Module:
        """The student after a run that hardly moves it."""
        chosen = student.model_copy(update={"learning_rate": learning_rate})
        run = self.params.runs["fc-ce"].model_copy(update={"seeds": (0,)})
        shutil.rmtree(out, ignore_errors=True)
        train_run("x", run, chosen, Recipe(epochs=1), self.run_paths(out), Workers(seeds_at_once=1))
        return load_student(out / "seed-0")


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Own:
    root = tmp_path_factory.mktemp("own") / "world"
    own = Own(world.copy(root).root)
    shutil.rmtree(own.root / "model")
    write_model(own.root / "model")
    own.make_teacher()
    own.carry(0, 1)
    return own


@pytest.fixture
def own(made: Own, tmp_path: Path) -> Own:
    return Own(made.copy(tmp_path / "own").root)


def embeddings(model: torch.nn.Module) -> torch.Tensor:
    found = [tensor for name, tensor in model.state_dict().items() if name.endswith("embeddings.weight")]
    found += [tensor for name, tensor in model.state_dict().items() if name == "embedding.weight"]
    return found[0]


@torch.inference_mode()
def said(model: torch.nn.Module, teacher: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What a student and the teacher say about some ids."""
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    live = load_classifier(teacher)(input_ids=ids).logits
    return model(ids, torch.ones_like(ids).bool()), live


def test_a_student_of_all_layers_is_its_teacher_after_a_run_that_moves_nothing(
    made: Own, tmp_path: Path
) -> None:
    ours, theirs = said(made.run(entry(init={"layers": [0, 1]}), tmp_path / "out"), made.teacher)
    assert torch.allclose(ours, theirs, atol=1e-5)
    other, _ = said(made.run(entry(init={"layers": [1, 0]}), tmp_path / "out"), made.teacher)
    assert not torch.allclose(other, theirs, atol=1e-2)
    random, _ = said(made.run(entry(), tmp_path / "out"), made.teacher)
    assert not torch.allclose(random, theirs, atol=1e-2)


def test_layers_are_taken_in_the_order_that_is_written(made: Own) -> None:
    torch.manual_seed(0)
    chosen = entry(layers=1, init={"layers": [1]})
    model = build_student(chosen, 23, 2)
    model.initialise(chosen, Cache.open(made.cache).weights_dir)
    teacher = load_file(made.teacher / "model.safetensors")
    held = {name.removeprefix("bert."): tensor for name, tensor in model.bert.state_dict().items()}
    name = "encoder.layer.{}.output.dense.weight"
    assert torch.equal(held[name.format(0)], teacher[f"bert.{name.format(1)}"])


def test_adding_weights_seals_again_without_the_teacher_and_verify_compares_them(own: Own) -> None:
    assert own.carry(1) == 0
    cache = Cache.open(own.cache)
    verify(cache)
    assert (cache.weights_layers, cache.manifest.format_version) == ((1,), 3)
    carried, teacher = (load_file(d / "model.safetensors") for d in (cache.weights_dir, own.teacher))
    assert set(carried) == set(bert_tensors([1]))
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in carried.items())
    chosen = own.entry(hidden=None, weights=Weights(layers=(0, 1)))
    with pytest.raises(SpecMismatch, match=r"weights\.layers"):
        verify_cache("toy", cache, chosen, own.dataset, own.teacher)
    own.carry()
    assert Cache.open(own.cache).manifest.format_version == 1


@pytest.mark.parametrize("kind", SMALL)
def test_embeddings_in_fewer_dimensions_are_the_best_factorisation(
    made: Own, kind: str, tmp_path: Path
) -> None:
    chosen = entry(**SMALL[kind], init={"embeddings": "svd"}) if kind == "tinybert" else (
        TypeAdapter(Student).validate_python({**SMALL[kind], "init": {"embeddings": "svd"}})
    )  # fmt: skip
    held = load_file(made.teacher / "model.safetensors")[BERT_EMBEDDINGS]
    start = embeddings(made.run(chosen, tmp_path / "out"))
    left, sizes, _ = torch.linalg.svd(held.double())
    best = left[:, :6] * sizes[:6]
    assert start.shape == (len(held), 6)
    assert torch.allclose(start @ start.T, (best @ best.T).float(), atol=1e-4)
    missed = held.norm() ** 2 - start.norm() ** 2
    assert float(missed) == pytest.approx(float((sizes[6:] ** 2).sum()), rel=1e-4)


def test_a_factorisation_of_full_width_loses_nothing_and_of_less_the_discarded_singular_values() -> None:
    torch.manual_seed(0)
    held = torch.randn(40, 12) @ torch.randn(12, 12)
    whole = factorise_embeddings(held, 12)
    assert torch.allclose(whole @ whole.T, held @ held.T, atol=1e-3)
    sizes = torch.linalg.svdvals(held.double())
    for width in (1, 5, 11):
        part = factorise_embeddings(held, width)
        back = part @ torch.linalg.lstsq(part, held).solution
        error = float((held - back).double().norm() ** 2)
        assert error == pytest.approx(float((sizes[width:] ** 2).sum()), rel=1e-3)


def test_ids_past_the_teachers_keep_their_random_embeddings(made: Own) -> None:
    chosen = TypeAdapter(Student).validate_python({**SMALL["fc"], "init": {"embeddings": "svd"}})
    torch.manual_seed(0)
    model = build_student(chosen, 30, 2)
    before = embeddings(model).clone()
    model.initialise(chosen, Cache.open(made.cache).weights_dir)
    assert torch.equal(embeddings(model)[23:], before[23:])
    assert not torch.isclose(embeddings(model)[:23], before[:23]).any()


def test_xavier_spreads_linear_maps_by_their_sizes_and_needs_no_teacher(own: Own, tmp_path: Path) -> None:
    own.carry()
    model = own.run(entry(tokenizer=40, init={"xavier": True}), tmp_path / "out")
    weight = model.state_dict()["bert.bert.encoder.layer.0.intermediate.dense.weight"]
    bound = (6 / (toy.WIDTH + 4 * toy.WIDTH)) ** 0.5
    assert float(weight.abs().max()) == pytest.approx(bound, rel=0.02)
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"layers": 1, "init": {"layers": [2]}}, r"init\.layers +\[2\] +of \[0, 1\]"),
        ({"width": 8}, r"hidden_size +8 +16"),
        ({"heads": 4}, r"num_attention_heads +4 +2"),
        ({"max_length": 40}, r"max_length +40 +at most 32"),
        ({"layers": 1, "width": 32, "init": {"embeddings": "svd"}}, r"width +32 +at most 16"),
        ({"init": {"embeddings": "svd"}, "kind": "fc", "embedding": 20}, r"embedding +20 +at most 16"),
    ],
)
def test_a_student_that_does_not_fit_is_refused_before_training_with_every_reason(
    made: Own, tmp_path: Path, changes: dict[str, Any], fault: str
) -> None:
    body = {"init": {"layers": [0, 1]}, **changes}
    if changes.get("kind") == "fc":
        chosen: Any = TypeAdapter(Student).validate_python(body)
    else:
        chosen = entry(**body)
    with pytest.raises(SpecMismatch, match=fault):
        made.run(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_a_student_does_not_have_are_refused(own: Own) -> None:
    cache = Cache.open(own.cache)
    weights = shutil.copytree(cache.weights_dir, own.root / "weights")
    change_json(weights / "config.json", hidden_act="relu", layer_norm_eps=0.1, intermediate_size=32)
    with pytest.raises(SpecMismatch) as refused:
        check_bert_start("it", entry(init={"layers": [0, 1]}), weights, (0, 1))
    fields = [fault.field for fault in refused.value.mismatches]
    assert fields == ["intermediate_size", "hidden_act", "layer_norm_eps"]
    change_json(weights / "config.json", model_type="llama")
    with pytest.raises(SpecMismatch, match=r"model_type +llama +bert"):
        check_bert_start("it", entry(init={"embeddings": "svd"}), weights, (0, 1))


def test_a_cache_without_weights_and_a_teacher_of_another_kind_are_refused(own: Own, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"layers 0 to 1, not \[5\]"):
        own.carry(5)
    own.carry()
    with pytest.raises(SpecMismatch, match="carries no weights"):
        own.run(entry(init={"layers": [0, 1]}), tmp_path / "out")
    change_json(own.teacher / "config.json", model_type="electra")
    with pytest.raises(TeacherError, match="its model_type is 'electra'"):
        own.carry(0)


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ({}, "init is empty"),
        ({"layers": [0, 1], "xavier": True}, "remove xavier and embeddings"),
        ({"layers": [0]}, "names 1 layers of the teacher for 2"),
    ],
)
def test_starts_that_contradict_themselves_are_refused(init: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        entry(init=init)


@pytest.mark.parametrize("kind", SMALL)
def test_embeddings_of_the_teacher_need_its_tokenizer(kind: str) -> None:
    with pytest.raises(ValidationError, match="so needs its tokenizer"):
        TypeAdapter(Student).validate_python({**SMALL[kind], "tokenizer": 50, "init": {"embeddings": "svd"}})
