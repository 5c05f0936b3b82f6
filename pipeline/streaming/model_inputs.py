"""What a model reads, as tensors by name, and how a model is called with what it reads of them.

Names are those of transformers (`input_ids`, `attention_mask`, `pixel_values`, ...). A student has the names
that it takes in `reads`, in the order of its forward; other inputs do not reach it.

Shape letters: B batch.
"""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.data.tokenizer import InputArrays
from storage.spec import ImageSpec

InputTensors = Mapping[str, torch.Tensor]  # each with B first


def input_tensors(arrays: InputArrays, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """These arrays as tensors on a device."""
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def on_device(inputs: InputTensors, device: torch.device) -> dict[str, torch.Tensor]:
    """The same inputs on this device."""
    return {name: value.to(device) for name, value in inputs.items()}


def num_rows(inputs: InputTensors) -> int:
    """Rows of a batch."""
    return len(next(iter(inputs.values())))


def unwrapped(model: torch.nn.Module) -> Any:
    """The model itself, where several processes train it: DistributedDataParallel wraps it."""
    return getattr(model, "module", model)


def inputs_of(model: torch.nn.Module) -> tuple[str, ...]:
    """The names of the inputs that a student reads."""
    reads: tuple[str, ...] = unwrapped(model).reads
    return reads


def call_model(model: torch.nn.Module, inputs: InputTensors) -> torch.Tensor:
    """The output of a student for the inputs that it reads."""
    output: torch.Tensor = model(**{name: inputs[name] for name in inputs_of(model)})
    return output


def for_transformers(inputs: InputTensors) -> dict[str, torch.Tensor]:
    """The same inputs as models of transformers take them: masks are int64, 1 for true."""
    return {name: value.long() if value.dtype == torch.bool else value for name, value in inputs.items()}


def normalised_images(pixels_BP: torch.Tensor, how: ImageSpec) -> torch.Tensor:
    """Images [B, channels, height, width], float32, of bytes [B, numbers of an image]."""
    images_BHWC = pixels_BP.view(-1, *how.shape)
    mean_C11, std_C11 = (
        torch.tensor(part, device=pixels_BP.device).view(-1, 1, 1) for part in (how.mean, how.std)
    )
    images_BCHW: torch.Tensor = (images_BHWC.permute(0, 3, 1, 2) / 255 - mean_C11) / std_C11
    return images_BCHW
