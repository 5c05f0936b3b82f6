"""The teacher stage: fine-tune a model on labels, or take it as it is; score it; say who it is."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.caches import mask_spec
from pipeline.config.teachers import Teacher
from pipeline.data.inputs import PixelReader, Reader, read_inputs
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizer import TOKENIZER_FILES, TextReader
from pipeline.engines.inference import InferenceRequest
from pipeline.engines.language_head import LanguageHead
from pipeline.engines.language_model import probability_mass
from pipeline.engines.loading import OFFLINE, ReadingSpec, convert_gguf, load_classifier, load_language_model
from pipeline.engines.masking import teacher_tokens
from pipeline.engines.sentence_encoder import embedding_spec
from pipeline.runtime import hardware
from pipeline.runtime.files import write_json
from pipeline.runtime.progress import log
from pipeline.teachers.finetune import fine_tune
from pipeline.teachers.record import RECORD, teacher_labels
from pipeline.teachers.scoring import extreme_rows, score_language_model, score_quality, try_extremes
from storage.disk import link
from storage.errors import AssetError, TeacherError
from storage.spec import ImageSpec


def prepare_teacher(name: str, entry: Teacher, dataset: Path, out: Path) -> dict[str, Any]:
    """Put the teacher `name` into the directory `out`; return its record, which is also out/teacher.json."""
    rows = load_rows(dataset)
    source = Path(entry.model)
    task = rows.task_spec
    if task.engine == "language_model":
        return _take_language_model(name, entry, rows, source, out)
    if entry.train and not task.trainable:
        raise TeacherError(
            f"teachers.{name}.train: only models of labelled rows are fine-tuned here, and the dataset's "
            f"task is {rows.task}.\nTake a model that was trained for it, and remove train."
        )
    if not (source / "config.json").is_file():
        raise AssetError(
            f"teachers.{name}.model: {source} is no directory with a config.json.\n"
            f"For a model of a hub, add it to assets (source: {entry.model}) and write model: assets/NAME."
        )
    hardware.pin_threads(hardware.num_cores())
    shutil.rmtree(out, ignore_errors=True)  # its files may be links to the model's own: never write into them
    out.mkdir(parents=True)
    how = _how(name, entry, source, rows)
    reader: Reader = PixelReader(math.prod(rows.shape))
    if not isinstance(how, ImageSpec):
        _save_tokenizer(source, out)
        reader = TextReader(out, entry.max_length, entry.too_long)
    words = task.inputs == "words"
    # All of them: what is too long is said before work starts.
    tokens = read_inputs(reader, rows, words)
    if entry.train:
        model, done = fine_tune(name, entry.train, source, rows, tokens, reader.pad_id, how)
        model.save_pretrained(out)
    else:
        model, done = load_classifier(source, task=rows.task, how=how, pad_token_id=reader.pad_id), None
        try_extremes(model, tokens, reader.pad_id)
        for file in [source / "config.json", *sorted(source.glob("*.safetensors*"))]:
            link(file.resolve(), out / file.name)
    names = () if not rows.label_names else teacher_labels(out, entry.labels, rows.label_names)
    if names and model.config.num_labels != len(names):
        raise TeacherError(
            f"teachers.{name}: the model gives {model.config.num_labels} logits a "
            f"{'token' if words else 'row'}, and there are {len(names)} labels: {list(names)}.\n"
            f"Name all its outputs{'' if words else f', or fine-tune it: teachers.{name}.train'}."
        )
    record: dict[str, Any] = {
        "task": rows.task,
        "labels": list(names),
        "max_length": reader.max_length,
        "too_long": entry.too_long,
        **score_quality(model, rows, tokens, reader.pad_id, names),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": done._asdict() if done else None,
    }
    if entry.train and entry.train.lora:
        record["lora"] = entry.train.lora.model_dump(mode="json")
    if how is not None:
        record["image" if isinstance(how, ImageSpec) else "embedding"] = how.model_dump(mode="json")
    write_json(record, out / RECORD)
    if "accuracy" in record:
        log(f"{name}: {record['accuracy']['test']:.1%} of the test {'words' if words else 'rows'} right")
    else:
        log(f"{name}: {record['quality']['test'] or 'taken as it is'}")
    return record


def _how(name: str, entry: Teacher, source: Path, rows: Rows) -> ReadingSpec | None:
    """How it reads images or makes vectors; None in all other tasks."""
    if rows.task_spec.inputs == "images":
        from pipeline.engines.image_classifier import image_spec  # transformers, some seconds

        return image_spec(source, rows.shape)
    if not rows.task_spec.makes_vectors:
        return None
    width = json.loads((source / "config.json").read_text()).get("hidden_size")
    if width is None:
        raise TeacherError(f"teachers.{name}: {source}/config.json has no hidden_size: how wide is a vector?")
    return embedding_spec(name, source, entry.embedding, width)


def _take_language_model(name: str, entry: Teacher, rows: Rows, source: Path, out: Path) -> dict[str, Any]:
    """Take a language model as it is: a directory of transformers, or a GGUF file in one."""
    if entry.train:
        raise TeacherError(f"teachers.{name}.train: language models are taken as they are; remove it.")
    packed = [source] if source.suffix == ".gguf" else sorted(source.glob("*.gguf"))
    has_config = (source / "config.json").is_file()
    if has_config and any(source.glob("*.safetensors")):
        packed = []  # quantised copies of what is taken
    if len(packed) > 1 or not (packed or has_config):
        raise AssetError(
            f"teachers.{name}.model: {source} holds neither a config.json nor one *.gguf "
            f"(found {len(packed)} of these).\n"
            f"Name the directory of a model, or a file: {source}/NAME.gguf."
        )
    hardware.pin_threads(hardware.num_cores())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if packed:
        convert_gguf(packed[0], out)
        _only_tokenizer_and_weights(out)
    else:
        _save_tokenizer(source, out)
        for file in [source / "config.json", *sorted(source.glob("*.safetensors*"))]:
            link(file.resolve(), out / file.name)
    reader = TextReader(out, entry.max_length, entry.too_long)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    mask = mask_spec(rows.task, None)
    read = teacher_tokens(rows.task, mask, tokens, rows.row_ids, reader.special)
    truth = tokens.ids if mask else np.roll(tokens.ids, -1)
    model = load_language_model(out, hardware.precision("auto"), rows.task_spec.auto_class)
    head = LanguageHead(model, min(reader.num_ids, model.config.get_text_config().vocab_size))
    request = InferenceRequest(read.tokens, rows.select("test"), reader.pad_id)
    probability_mass(head, request._replace(rows=extreme_rows(tokens)), read.has_target)
    seen = score_language_model(head, request, read.has_target, truth)
    record: dict[str, Any] = {
        "task": rows.task,
        "labels": [],
        "vocab_size": head.vocab_size,
        "max_length": entry.max_length,
        "too_long": entry.too_long,
        "accuracy": {"test": seen.accuracy},
        "reading": {"test": seen._asdict()},
        "parameters": model.num_parameters(),
        "training": None,
    }
    write_json(record, out / RECORD)
    log(f"{name}: perplexity {np.exp(seen.loss):.1f} on the test rows")
    return record


def _save_tokenizer(source: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source, **OFFLINE).save_pretrained(out)
    except (OSError, ValueError) as error:
        raise TeacherError(f"the tokenizer in {source} cannot be loaded: {error}") from error
    _only_tokenizer_and_weights(out)


def _only_tokenizer_and_weights(out: Path) -> None:
    for extra in out.iterdir():
        if extra.name not in (*TOKENIZER_FILES, "config.json") and ".safetensors" not in extra.name:
            extra.unlink()
