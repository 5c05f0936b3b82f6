"""A teacher's fingerprint is what it computes: tensors and config, not how they were saved."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.engines.loading import load_classifier
from pipeline.engines.model_files import teacher_identity
from pipeline.teachers.files import save_tokenizer
from pipeline.teachers.record import teacher_labels, teacher_reader
from storage.errors import AssetError, TeacherError
from tests import toy


@pytest.fixture
def model(tmp_path: Path) -> Path:
    toy.write_model(tmp_path / "model")
    return tmp_path / "model"


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=1))


def test_the_order_and_metadata_of_the_weights_file_do_not_matter(model: Path) -> None:
    before = teacher_identity(model)
    tensors = load_file(model / "model.safetensors")
    save_file(dict(reversed(tensors.items())), model / "model.safetensors", {"saved": "by another tool"})
    assert teacher_identity(model) == before


def test_weights_in_several_files_are_the_same_weights(model: Path) -> None:
    before = teacher_identity(model)
    tensors = list(load_file(model / "model.safetensors").items())
    (model / "model.safetensors").unlink()
    save_file(dict(tensors[::2]), model / "model-00001-of-00002.safetensors")
    save_file(dict(tensors[1::2]), model / "model-00002-of-00002.safetensors")
    assert teacher_identity(model) == before


def test_one_weight_by_one_bit_is_another_teacher(model: Path) -> None:
    before = teacher_identity(model)
    tensors = load_file(model / "model.safetensors")
    weights = tensors["classifier.weight"].view(-1).view(dtype=torch.int32)
    weights[0] ^= 1
    save_file(tensors, model / "model.safetensors")
    after = teacher_identity(model)
    assert after.weights != before.weights
    assert after.config == before.config


def test_two_tensors_that_change_names_are_another_teacher(model: Path) -> None:
    before = teacher_identity(model)
    tensors = load_file(model / "model.safetensors")
    first, second = (f"bert.encoder.layer.{i}.output.dense.weight" for i in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, model / "model.safetensors")
    assert teacher_identity(model).weights != before.weights


def test_where_and_how_a_config_was_saved_does_not_matter_and_its_content_does(model: Path) -> None:
    before = teacher_identity(model)
    change_config(model, transformers_version="0.0", _name_or_path="/elsewhere", torch_dtype="float16")
    assert teacher_identity(model) == before
    change_config(model, layer_norm_eps=1e-3)
    assert teacher_identity(model).config != before.config
    assert teacher_identity(model).weights == before.weights


def test_pickled_weights_are_never_opened(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    for read in (teacher_identity, load_classifier):
        with pytest.raises(AssetError, match="can contain code"):
            read(model)


class Deadly:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def with_own_code(model: Path, mark: Path, **changes: object) -> None:
    """Let a model name code of its own, which leaves a mark when it is run."""
    (model / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    change_config(model, auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"}, **changes)


def test_code_that_comes_with_a_model_is_never_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with_own_code(model, mark)
    load_classifier(model)  # transformers has a BERT of its own
    with_own_code(model, mark, model_type="evil")
    with pytest.raises(TeacherError, match=r"needs code of its own(?s:.)*no architecture 'evil'"):
        load_classifier(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TeacherError, match=r"the tokenizer in .* cannot be loaded"):
        save_tokenizer(model, tmp_path)
    assert not mark.exists()


def test_a_pickle_among_the_files_of_a_model_is_not_opened(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    deadly = pickle.dumps(Deadly(mark))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pt"):
        (model / name).write_bytes(deadly)
    load_classifier(model)
    (model / "model.safetensors").write_bytes(deadly)
    with pytest.raises(TeacherError, match="cannot be loaded as a classifier"):
        load_classifier(model)
    with pytest.raises(TeacherError, match="is not a safetensors file"):
        teacher_identity(model)
    assert not mark.exists()
    pickle.loads(deadly)
    assert mark.exists(), "it would have been seen"


def test_a_model_without_a_trained_head_is_not_a_teacher(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(TeacherError, match=r"lack classifier\.bias, classifier\.weight"):
        load_classifier(model)
    assert load_classifier(model, 3).config.num_labels == 3  # fine-tuning makes one


def test_a_head_of_another_size_and_unknown_settings_are_named_errors(model: Path) -> None:
    with pytest.raises(TeacherError, match="cannot be loaded as a classifier"):
        load_classifier(model, 3)
    (model / "config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(TeacherError, match="cannot be loaded as a classifier"):
        load_classifier(model)


def test_labels_may_come_in_any_order_but_must_be_those_of_the_dataset(model: Path) -> None:
    assert teacher_labels(model, None, ("positive", "negative")) == ("negative", "positive")
    assert teacher_labels(model, ("b", "a"), ("a", "b")) == ("b", "a")
    with pytest.raises(TeacherError, match="are not this dataset's"):
        teacher_labels(model, None, ("neg", "pos"))


def test_a_directory_without_a_teacher_is_refused_with_how_to_make_one(tmp_path: Path, model: Path) -> None:
    shutil.rmtree(model)
    with pytest.raises(AssetError, match="dvc repro teacher@model"):
        teacher_reader(model)
