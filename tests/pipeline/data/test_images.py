"""Which images, and which teachers of images, are refused, and why."""

import json
from pathlib import Path

import pytest

from pipeline.config.datasets import Dataset
from pipeline.data.prepare import prepare_dataset
from storage.errors import AssetError, DataError, TeacherError
from tests.pipeline import row_worlds


@pytest.mark.parametrize(
    ("image", "line"),
    [
        ([7], "found 1 numbers, expected 4"),
        ([7] * 5, "found 5 numbers, expected 4"),
        ([7, 7, 7, 256], "found numbers from 7 to 256"),
        ([7, 7, 7, -1], "found numbers from -1 to 7"),
        ([7, 7, 7, 0.5], "found numbers from 0.5 to 7"),
    ],
)
def test_a_row_that_is_no_image_is_refused_with_its_number(
    tmp_path: Path, image: list[float], line: str
) -> None:
    images = [[i, i, i, i + 1] for i in range(40)]
    lines = [{"image": image if i == 3 else own, "label": i % 2} for i, own in enumerate(images)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    entry = {"task": "image-classification", "path": str(tmp_path / "rows.jsonl"), "labels": ["even", "odd"]}
    entry |= {"images": {"shape": [2, 2, 1]}}
    with pytest.raises(DataError, match=rf"row 3 has no image of shape \(2, 2, 1\): {line}"):
        prepare_dataset("toy", Dataset.model_validate(entry), tmp_path / "prepared")


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
