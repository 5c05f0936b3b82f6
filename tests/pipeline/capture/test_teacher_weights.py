"""A cache that carries weights: the teacher's own, sealed without asking it, refused where they differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.teacher_weights import check_weights, find_tensors, write_tensors
from pipeline.capture.verify import verify_cache
from pipeline.config.caches import CacheEntry
from pipeline.config.params import Run, RunInputs, Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import LlamaStudent
from pipeline.students.llama_weights import (
    FINAL_NORM,
    LAYER_PARTS,
    LLAMA_EMBEDDINGS,
    check_llama_start,
    llama_tensor,
)
from pipeline.training.run import train_run
from storage import Cache
from storage.errors import AssetError, SpecMismatch, TeacherError
from storage.verify import verify
from storage.writer import Store
from tests.golden import make_weights
from tests.pipeline.capture.test_capture import change_json, content, no_teacher
from tests.pipeline.prose import Prose

GOLDEN = make_weights.GOLDEN


@pytest.fixture
def prose(prose: Prose, tmp_path: Path) -> Prose:
    """A copy, to be changed."""
    return Prose.copied(prose.root, tmp_path / "own")


def entry(prose: Prose, *layers: int) -> CacheEntry:
    carried = {"layers": list(layers)} if layers else None
    return CacheEntry.model_validate({**prose.entry().model_dump(), "weights": carried})


def seal(prose: Prose, *layers: int) -> Captured:
    store = Store(prose.root / "store")
    return capture_cache(
        CaptureJob("prose", entry(prose, *layers), prose.dataset, prose.teacher, prose.cache, store)
    )


def check(prose: Prose, *layers: int) -> None:
    verify_cache("prose", Cache.open(prose.cache), entry(prose, *layers), prose.dataset, prose.teacher)


def rewrite(teacher: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the teacher's tensors."""
    path = teacher / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # it is a link to the model's
    save_file(tensors, path, metadata={"format": "pt"})


def test_adding_changing_and_removing_weights_seals_again_without_the_teacher(
    prose: Prose, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, plain = content(prose.cache), Cache.open(prose.cache)
    monkeypatch.setattr("pipeline.engines.language_model.load_language_model", no_teacher)
    assert seal(prose, 1).computed_rows == 0
    with_weights = Cache.open(prose.cache)
    assert with_weights.identity == plain.identity
    assert with_weights.shards == plain.shards
    assert (with_weights.weights_layers, with_weights.manifest.format_version) == ((1,), 3)
    first = content(prose.cache)
    seal(prose, 0, 1)
    assert Cache.open(prose.cache).weights_layers == (0, 1)
    seal(prose, 1)
    assert content(prose.cache) == first
    seal(prose)
    assert content(prose.cache) == before


def test_what_is_carried_are_the_teachers_own_tensors_in_its_own_type(prose: Prose) -> None:
    rewrite(prose.teacher, lambda t: t.update({name: t[name].bfloat16() for name in list(t)}))
    prose.capture()  # other weights are another teacher
    seal(prose, 1)
    teacher, carried = (
        load_file(directory / "model.safetensors")
        for directory in (prose.teacher, Cache.open(prose.cache).weights_dir)
    )
    assert set(carried) == {
        LLAMA_EMBEDDINGS,
        FINAL_NORM,
        "lm_head.weight",
        *(llama_tensor(1, part) for part in LAYER_PARTS),
    }
    for name, tensor in carried.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, teacher[name])
    config = (prose.teacher / "config.json").read_bytes()
    assert (prose.cache / "weights" / "config.json").read_bytes() == config


def test_tensors_are_found_in_any_file_and_a_tied_head_is_not_carried(prose: Prose) -> None:
    tensors = load_file(prose.teacher / "model.safetensors")
    (prose.teacher / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for place, name in enumerate(sorted(tensors)):
        save_file({name: tensors[name]}, prose.teacher / f"model-{place:05}.safetensors")
    change_json(prose.teacher / "config.json", tie_word_embeddings=True)
    found = find_tensors("prose", prose.teacher, [0])
    assert set(found) == {LLAMA_EMBEDDINGS, FINAL_NORM, *(llama_tensor(0, part) for part in LAYER_PARTS)}
    (prose.root / "out").mkdir()
    write_tensors(found, prose.teacher, prose.root / "out")
    for name, tensor in load_file(prose.root / "out" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name])


def _bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: change_json(t / "config.json", model_type="gpt2"), "its model_type is 'gpt2'"),
        (lambda t: change_json(t / "config.json", num_hidden_layers=1), r"has layers 0 to 0, not \[1\]"),
        (
            lambda t: rewrite(t, lambda w: w.pop(llama_tensor(1, "mlp.up_proj"))),
            "has no .*1.mlp.up_proj.weight",
        ),
        (lambda t: rewrite(t, lambda w: w.pop("lm_head.weight")), "it has no lm_head.weight"),
        (lambda t: rewrite(t, _bias), "it has model.layers.1.self_attn.q_proj.bias too"),
    ],
)
def test_teachers_of_another_kind_are_refused_before_they_are_loaded(
    prose: Prose, change: Callable[[Path], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(prose.root / "store")
    before = content(prose.cache)
    change(prose.teacher)
    monkeypatch.setattr("pipeline.engines.language_model.load_language_model", no_teacher)
    with pytest.raises(TeacherError, match=reason) as refused:
        seal(prose, 1)
    assert "layers 0 to" in reason or "Supported is model_type llama with the tensors" in str(refused.value)
    assert content(prose.cache) == before


def test_a_teacher_without_weights_is_refused(prose: Prose) -> None:
    (prose.teacher / "model.safetensors").unlink()
    with pytest.raises(AssetError, match="there are no weights"):
        find_tensors("prose", prose.teacher, [0])


def test_verify_refuses_other_layers_and_other_tensors_than_the_teachers(prose: Prose) -> None:
    seal(prose, 1)
    check(prose, 1)
    with pytest.raises(SpecMismatch, match=r"weights\.layers +\[1\] +\[0, 1\]"):
        check(prose, 0, 1)
    with pytest.raises(SpecMismatch, match=r"weights\.layers +\[1\] +\[\]"):
        check(prose)
    other = prose.root / "other"
    shutil.copytree(prose.teacher, other)
    name = llama_tensor(1, "mlp.down_proj")
    rewrite(other, lambda t: t.update({name: t[name] * 2}))
    with pytest.raises(SpecMismatch, match=r"down_proj\.weight +another tensor +the teacher's") as refused:
        check_weights("prose", Cache.open(prose.cache), entry(prose, 1).weights, other)
    assert [fault.field for fault in refused.value.mismatches] == [name]


def student(**changes: object) -> LlamaStudent:
    """One that fits the toy: 16 wide, two heads of 8, 24 inside, two layers."""
    sizes = {"layers": 2, "width": 8, "heads": 1, "inner": 16, "init": {"layers": [1, 0]}}
    return LlamaStudent.model_validate({"kind": "llama", **sizes, **changes})


def train(prose: Prose, chosen: LlamaStudent) -> None:
    verified = prose.root / "verified.json"
    verified.write_text(json.dumps({"manifest": Cache.open(prose.cache).manifest_sha256}))
    run = Run(dataset="prose", cache="prose", student="small", recipe="kd")
    paths = RunInputs(prose.cache, prose.dataset, verified, prose.root / "out")
    train_run("x", run, chosen, Recipe(alpha=0.0), paths, Workers(seeds_at_once=1))


def test_a_run_is_refused_before_training_where_the_cache_lacks_a_layer(prose: Prose) -> None:
    seal(prose, 1)
    cache = Cache.open(prose.cache)
    for fitting in (student(layers=1, init={"layers": [1]}), student(init=None)):
        check_llama_start("it", fitting, cache.weights_dir, cache.weights_layers)
    with pytest.raises(
        SpecMismatch, match=r"runs\.x cannot start from (.|\n)*init\.layers +\[1, 0\] +of \[1\]"
    ) as no:
        train(prose, student())
    assert "add layers under caches.NAME.weights" in str(no.value)
    seal(prose)
    with pytest.raises(SpecMismatch, match="carries no weights"):
        train(prose, student())
    assert not (prose.root / "out").exists()


def test_a_golden_cache_with_weights_stays_readable_and_is_made_the_same_today(tmp_path: Path) -> None:
    cache = Cache.open(GOLDEN)
    verify(cache)
    assert (cache.manifest.format_version, cache.weights_layers) == (3, make_weights.LAYERS)
    with safe_open(cache.weights_dir / "model.safetensors", "pt") as file:
        assert file.get_tensor(llama_tensor(2, "mlp.gate_proj"))[0].tolist() == [1.0, 2.0, 3.0, 4.0]
        assert len(set(file.keys())) == 2 + 2 * len(LAYER_PARTS)
    assert json.loads((cache.weights_dir / "config.json").read_text())["model_type"] == "llama"
    make_weights.write(tmp_path / "made")
    assert content(tmp_path / "made") == content(GOLDEN), "raise FORMAT_VERSION, and docs/cache-format.md"
