"""Classifiers, regressors and encoders of rows as teachers: fine-tuned, or taken as they are."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.teachers import Teacher
from pipeline.data.inputs import PixelReader, Reader, read_inputs
from pipeline.data.rows import TEST, Rows
from pipeline.data.tokenizer import TextReader
from pipeline.engines.loading import ReadingSpec, load_classifier
from pipeline.engines.sentence_encoder import embedding_spec
from pipeline.runtime import hardware
from pipeline.runtime.progress import log
from pipeline.teachers.extremes import try_extremes
from pipeline.teachers.files import empty_directory, link_model, save_tokenizer
from pipeline.teachers.finetune import fine_tune
from pipeline.teachers.record import teacher_labels
from pipeline.teachers.scoring import TeacherRows, score_quality
from storage.errors import AssetError, TeacherError
from storage.spec import ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.training.job import Fit


def prepare_classifier(name: str, entry: Teacher, rows: Rows, out: Path) -> dict[str, Any]:
    """Put a model of rows or words into `out`; return its record."""
    _check_entry(name, entry, rows)
    hardware.pin_threads(hardware.num_cores())
    empty_directory(out)
    reading = _reading_spec(name, entry, rows)
    reader = _reader(entry, rows, reading, out)
    # Reads all rows first: a row that is too long is refused before any work.
    inputs = read_inputs(reader, rows, rows.task_spec.inputs == "words")
    teacher_rows = TeacherRows(rows, inputs, reader.pad_id)
    model, done = _obtain(name, entry, teacher_rows, reading, out)
    labels = () if not rows.label_names else teacher_labels(out, entry.labels, rows.label_names)
    _check_outputs(name, model, labels, rows)
    record: dict[str, Any] = {
        "task": rows.task,
        "labels": list(labels),
        "max_length": reader.max_length,
        "too_long": entry.too_long,
        **score_quality(model, teacher_rows, labels),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": done._asdict() if done else None,
    }
    if entry.train and entry.train.lora:
        record["lora"] = entry.train.lora.model_dump(mode="json")
    if reading is not None:
        record["image" if isinstance(reading, ImageSpec) else "embedding"] = reading.model_dump(mode="json")
    if "accuracy" in record:
        log(f"{name}: {record['accuracy'][TEST]:.1%} of the {TEST} {_unit(rows)}s right")
    else:
        log(f"{name}: {record['quality'][TEST] or 'taken as it is'}")
    return record


def _obtain(
    name: str, entry: Teacher, teacher_rows: TeacherRows, reading: ReadingSpec | None, out: Path
) -> "tuple[PreTrainedModel, Fit | None]":
    """(the model, whose files are in `out`; what fine-tuning did, where the entry has it)."""
    source = Path(entry.model)
    if entry.train:
        model, done = fine_tune(name, entry.train, source, teacher_rows, reading)
        model.save_pretrained(out)
        return model, done
    model = load_classifier(
        source, task=teacher_rows.rows.task, reading=reading, pad_token_id=teacher_rows.pad_id
    )
    try_extremes(model, teacher_rows)
    link_model(source, out)
    return model, None


def _reading_spec(name: str, entry: Teacher, rows: Rows) -> ReadingSpec | None:
    """How the model reads images or makes vectors; None in all other tasks."""
    source = Path(entry.model)
    if rows.task_spec.inputs == "images":
        from pipeline.engines.image_classifier import image_spec  # transformers, some seconds

        return image_spec(source, rows.shape)
    if not rows.task_spec.makes_vectors:
        return None
    width = json.loads((source / "config.json").read_text()).get("hidden_size")
    if width is None:
        raise TeacherError(
            f"teachers.{name}: {source}/config.json has no hidden_size, the width of its vectors.\n"
            "Take a model of transformers whose config.json has it."
        )
    return embedding_spec(name, source, entry.embedding, width)


def _reader(entry: Teacher, rows: Rows, reading: ReadingSpec | None, out: Path) -> Reader:
    """The reader of the model's inputs; a tokenizer is saved in `out`."""
    if isinstance(reading, ImageSpec):
        return PixelReader(math.prod(rows.shape))
    save_tokenizer(Path(entry.model), out)
    return TextReader(out, entry.max_length, entry.too_long)


def _unit(rows: Rows) -> str:
    return "word" if rows.task_spec.inputs == "words" else "row"


def _check_entry(name: str, entry: Teacher, rows: Rows) -> None:
    if entry.train and not rows.task_spec.trainable:
        raise TeacherError(
            f"teachers.{name}.train: only models of labelled rows are fine-tuned here, and the dataset's "
            f"task is {rows.task}.\nTake a model that was trained for it, and remove train."
        )
    if not (Path(entry.model) / "config.json").is_file():
        raise AssetError(
            f"teachers.{name}.model: {entry.model} is not a directory with a config.json.\n"
            f"For a model of a hub, add it to assets (source: {entry.model}) and write model: assets/NAME."
        )


def _check_outputs(name: str, model: "PreTrainedModel", labels: tuple[str, ...], rows: Rows) -> None:
    """Raise TeacherError where the model has another number of outputs than there are labels."""
    if not labels or model.config.num_labels == len(labels):
        return
    advice = f", or fine-tune it: teachers.{name}.train" if rows.task_spec.trainable else ""
    raise TeacherError(
        f"teachers.{name}: the model gives {model.config.num_labels} logits a "
        f"{'token' if rows.task_spec.engine == 'tokens' else 'row'}, and there are {len(labels)} labels: "
        f"{list(labels)}.\nName all its outputs{advice}."
    )
