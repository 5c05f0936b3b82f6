"""Teachers of images: perceptrons of this project, registered with transformers, and its own classifiers.

A perceptron is a directory with a config.json (`model_type: stillroom-mlp`, `hidden_sizes`), with weights, or
without: then it is trained from random ones.

Shape letters: B batch, P numbers of an image, H height, W width, C channels.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from pipeline.streaming.model_inputs import normalised_images
from pipeline.students.mlp import perceptron
from storage.errors import AssetError, TeacherError
from storage.spec import ImageSpec


class MLPConfig(PretrainedConfig):  # type: ignore[misc]  # transformers has no types
    """The layers of a perceptron, and the images that it reads."""

    model_type = "stillroom-mlp"

    def __init__(
        self,
        hidden_sizes: tuple[int, ...] = (512, 256, 128, 64),
        image_size: tuple[int, int] = (28, 28),
        num_channels: int = 1,
        hidden_dropout_prob: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.hidden_sizes = list(hidden_sizes)
        self.image_size, self.num_channels = list(image_size), num_channels
        self.hidden_dropout_prob = hidden_dropout_prob


class MLPForImageClassification(PreTrainedModel):  # type: ignore[misc]
    """Linear layers and ReLUs over all numbers of an image."""

    config_class = MLPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MLPConfig) -> None:
        super().__init__(config)
        num = math.prod(config.image_size) * config.num_channels
        self.layers = perceptron(num, config.hidden_sizes, config.num_labels, config.hidden_dropout_prob)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Logits [B, labels] of images [B, C, H, W]."""
        return ImageClassifierOutput(logits=self.layers(pixel_values.flatten(1)))


AutoConfig.register(MLPConfig.model_type, MLPConfig)
AutoModelForImageClassification.register(MLPConfig, MLPForImageClassification)


class ImageModel(nn.Module):
    """A classifier of images that is called with rows of pixels [B, P]."""

    def __init__(self, model: PreTrainedModel, spec: ImageSpec) -> None:
        super().__init__()
        self.model, self.config, self._spec = model, model.config, spec

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """Logits [B, labels] of bytes [B, P]."""
        images_BCHW = normalised_images(pixel_values, self._spec)
        output: ImageClassifierOutput = self.model(pixel_values=images_BCHW)
        return output

    def save_pretrained(self, directory: Path) -> None:
        """As transformers saves it."""
        self.model.save_pretrained(directory)


def has_weights(directory: Path) -> bool:
    """Whether `directory` has weights: that of a perceptron may have a config.json alone."""
    return any(directory.glob("*.safetensors"))


def untrained_mlp(directory: Path, spec: ImageSpec, **settings: Any) -> MLPForImageClassification:
    """The perceptron of config.json, with random weights from torch's current seed.

    Raises AssetError for another kind of model.
    """
    found = json.loads((directory / "config.json").read_text())
    if found.get("model_type") != MLPConfig.model_type:
        raise AssetError(
            f"{directory} holds a config.json of a {found.get('model_type')} and no *.safetensors.\n"
            f"A model without weights is trained from random ones where it is a {MLPConfig.model_type}."
        )
    size = {"image_size": spec.shape[:2], "num_channels": spec.shape[2]}
    return MLPForImageClassification(MLPConfig(**{**found, **size, **settings}))


def image_spec(directory: Path, shape: tuple[int, ...]) -> ImageSpec:
    """How the model in `directory` reads images of this shape: by its preprocessor_config.json, or as numbers
    from 0 to 1 where it has none.

    Raises TeacherError where its config.json expects another shape, or the file has an unsupported setting.
    """
    config = json.loads((directory / "config.json").read_text())
    size, channels = config.get("image_size"), config.get("num_channels", shape[2])
    sides = [size, size] if isinstance(size, int) else size
    if (sides is not None and list(sides) != list(shape[:2])) or channels != shape[2]:
        raise TeacherError(
            f"the model in {directory} does not read the images of this dataset.\n"
            f"  shape found    {[*(sides or shape[:2]), channels]}\n  shape expected {list(shape)}\n"
            "Write the model's shape under datasets.NAME.images.shape: images are resized to it."
        )
    path = directory / "preprocessor_config.json"
    steps: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"do_normalize": False}
    if not math.isclose(steps.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-3):
        raise TeacherError(
            f"{path} has rescale_factor {steps['rescale_factor']}, expected 1/255.\n"
            "Take a model that reads bytes as numbers from 0 to 1."
        )
    mean, std = [0.0] * shape[2], [1.0] * shape[2]
    if steps.get("do_normalize", True):
        mean, std = steps.get("image_mean", mean), steps.get("image_std", std)
    return ImageSpec(shape=shape, mean=tuple(map(float, mean)), std=tuple(map(float, std)))
