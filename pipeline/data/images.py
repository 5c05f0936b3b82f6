"""Images of a raw dataset -> rows of pixels: one byte a number, row after row of the image, channels last.

The row id of an image is made of its shape and the sha256 of its pixels, as that of a text is of the text.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.datasets import Dataset
from storage.errors import DataError

PixelRows = npt.NDArray[np.uint8]  # N rows x numbers of an image


def read_images(
    name: str,
    config: Dataset,
    columns: Mapping[str, list[Any]],
    taken: Sequence[str],
    counts: Counter[str],
) -> PixelRows:
    """The images of a dataset: from one column, or from one column a pixel (all columns that are not
    `taken`).

    An image is what `datasets` returns for one ({"bytes", "path"}), the bytes of a file, or a list of numbers
    from 0 to 255, nested or not. Counts resized images in `counts`. Raises DataError for anything else.
    """
    assert config.images is not None
    shape = config.images.shape
    size = int(np.prod(shape))
    if config.columns.image is None:
        cells = [column for key, column in columns.items() if key not in (*taken, *config.where)]
        if len(cells) != size:
            raise DataError(
                f"datasets.{name}: {len(cells)} columns of pixels, expected {size} (images.shape {shape}).\n"
                f"Fix images.shape, or name the label's column (found {list(columns)[-3:]} at the end)."
            )
        images: list[Any] = list(zip(*cells, strict=True))
    else:
        images = columns[config.columns.image]
    made = np.empty((len(images), size), np.uint8)
    for row, image in enumerate(images):
        try:
            made[row] = _numbers(image, shape, counts)
        except (ValueError, TypeError, OSError) as error:
            raise DataError(
                f"datasets.{name}: row {row} has no image of shape {tuple(shape)}: {error}\n"
                "Expected a file's bytes, or whole numbers from 0 to 255. Fix it, or images.shape."
            ) from error
    return made


def image_names(images: PixelRows, shape: Sequence[int]) -> list[str]:
    """The content of each image for its row id: `HxWxC:` and sha256 hex of its pixels."""
    size = "x".join(str(side) for side in shape)
    return [f"{size}:{hashlib.sha256(image.tobytes()).hexdigest()}" for image in images]


def _numbers(image: Any, shape: Sequence[int], counts: Counter[str]) -> npt.NDArray[Any]:
    if isinstance(image, dict):
        image = image["bytes"] or image["path"]
    if isinstance(image, bytes | str):
        return _decoded(image, shape, counts)
    numbers = np.asarray(image, np.float64).reshape(-1)
    if len(numbers) != np.prod(shape):
        raise ValueError(f"found {len(numbers)} numbers, expected {np.prod(shape)}")
    if not ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
        raise ValueError(f"found numbers from {numbers.min():g} to {numbers.max():g}")
    return numbers


def _decoded(image: bytes | str, shape: Sequence[int], counts: Counter[str]) -> npt.NDArray[Any]:
    """The pixels of a file (PNG, JPEG, ...) or of its bytes, resized to `shape` if it has another size."""
    from PIL import Image

    height, width, channels = shape
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
        found = file.convert("L" if channels == 1 else "RGB")
    if found.size != (width, height):
        counts["resized"] += 1
        found = found.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(found).reshape(-1)
