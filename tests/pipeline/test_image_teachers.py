"""Which teachers of images are refused, and why."""

import json
from pathlib import Path

import pytest

from storage.errors import AssetError, TeacherError
from tests.pipeline import row_worlds


def test_a_teacher_of_other_images_is_refused(tmp_path: Path) -> None:
    world = row_worlds.images(tmp_path)
    world.prepare()
    found = {"model_type": "stillroom-mlp", "hidden_sizes": [8], "image_size": [28, 28]}
    (tmp_path / "mlp" / "config.json").write_text(json.dumps(found))
    with pytest.raises(TeacherError, match=r"\[28, 28, 1\]"):
        world.make_teacher()


def test_a_model_without_weights_that_is_no_perceptron_is_refused(tmp_path: Path) -> None:
    world = row_worlds.images(tmp_path)
    world.prepare()
    (tmp_path / "mlp" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(AssetError, match=r"config\.json of a vit and no \*\.safetensors"):
        world.make_teacher()


def test_a_teacher_that_wants_bytes_on_another_scale_is_refused(tmp_path: Path) -> None:
    world = row_worlds.images(tmp_path)
    world.prepare()
    (tmp_path / "mlp" / "preprocessor_config.json").write_text(json.dumps({"rescale_factor": 1 / 127.5}))
    with pytest.raises(TeacherError, match=r"rescale_factor 0\.0078.*, expected 1/255"):
        world.make_teacher()
