"""`frozen_layers` excludes layers from a teacher's fine-tuning, and is refused where it cannot."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.teachers import TeacherTraining
from pipeline.teachers.prepare import prepare_teacher
from storage.errors import TeacherError
from tests.pipeline.conftest import World


def tuned(world: World, out: Path, frozen: int | None) -> dict[str, torch.Tensor]:
    """The weights after a short fine-tuning."""
    train = TeacherTraining(epochs=1, batch_rows=16, learning_rate=1e-2, frozen_layers=frozen)
    entry = world.params.teachers["tiny"].model_copy(update={"train": train})
    prepare_teacher("tiny", entry, world.dataset, out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_frozen_layers_keep_their_weights_and_all_others_are_trained(
    world: World, tmp_path: Path, frozen: int | None
) -> None:
    before = load_file(world.root / "model" / "model.safetensors")
    after = tuned(world, tmp_path / "teacher", frozen)
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    words, first, second = "word_embeddings", "layer.0.output.dense", "layer.1.output.dense"
    for part, kept in ((words, frozen is not None), (first, frozen == 1), (second, False)):
        names = {name for name in before if f"{part}.weight" in name}
        assert names
        assert (names <= same) is kept, part


def test_more_layers_than_the_model_has_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"frozen_layers: 9 layers cannot be frozen, the model has 2"):
        tuned(world, tmp_path / "teacher", 9)
