"""teacher.json: the record that the teacher stage writes, and how it is read."""

import math
from pathlib import Path
from typing import Any

from pipeline.data.inputs import PixelReader, Reader
from pipeline.data.tokenizer import TextReader
from pipeline.engines.loading import ReadingSpec
from pipeline.engines.model_files import read_json
from storage.errors import TeacherError
from storage.spec import EmbeddingSpec, ImageSpec

RECORD = "teacher.json"


def reading_spec(directory: Path) -> ReadingSpec | None:
    """How the teacher reads images or makes vectors, as recorded; None in other tasks."""
    found = teacher_record(directory)
    if "image" in found:
        return ImageSpec.model_validate(found["image"])
    return EmbeddingSpec.model_validate(found["embedding"]) if "embedding" in found else None


def teacher_reader(directory: Path) -> Reader:
    """The teacher's tokenizer with the recorded maximum length; for images, a reader of their size."""
    settings = teacher_record(directory)
    if isinstance(images := reading_spec(directory), ImageSpec):
        return PixelReader(math.prod(images.shape))
    return TextReader(directory, settings["max_length"], settings["too_long"])


def teacher_record(directory: Path) -> dict[str, Any]:
    """The record: task, labels, maximum length, score, cost. Raises AssetError where it is missing."""
    return read_json(directory / RECORD, directory)


def teacher_labels(
    directory: Path, override: tuple[str, ...] | None, expected: tuple[str, ...]
) -> tuple[str, ...]:
    """Names of the head's outputs, in order. Raises TeacherError where they are not the dataset's labels."""
    names = read_json(directory / "config.json", directory).get("id2label", {})
    found = override or tuple(names[key] for key in sorted(names, key=int))
    if sorted(found) != sorted(expected):
        raise TeacherError(
            f"the labels of the teacher in {directory} are not this dataset's.\n"
            f"  found    {list(found)}\n  expected {list(expected)} in any order\n"
            "Name its outputs in order under teachers.NAME.labels, or fine-tune it: teachers.NAME.train."
        )
    return found
