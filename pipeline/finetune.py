"""The teacher stage: fine-tune a model on labels, or take it as it is; score it; say who it is."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import (
    adapters,
    config_teachers,
    engine,
    hardware,
    inputs,
    language,
    row_tasks,
    targets,
    teachers,
)
from pipeline.batches import BUCKET_BATCHES, DistillBatch
from pipeline.data import Rows, load_rows
from pipeline.inputs import Inputs
from pipeline.progress import bar, log
from pipeline.prompts import prompts
from pipeline.tagging import where_labelled
from pipeline.tokens import FILES, TextReader, Tokens
from pipeline.training import Fit, Settings, Validation, fit
from pipeline.vectors import how_made
from storage import order
from storage.errors import AssetError, TeacherError
from storage.spec import LANGUAGE, ImageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How transformers calls what a head is trained for.
PROBLEMS = {"multi-label-classification": "multi_label_classification", "regression": "regression"}


def make_teacher(name: str, entry: config_teachers.Teacher, dataset: Path, out: Path) -> dict[str, Any]:
    """Put the teacher `name` into the directory `out`; return its record, which is also out/teacher.json."""
    rows = load_rows(dataset)
    source = Path(entry.model)
    if rows.task in LANGUAGE:
        return _take_language_model(name, entry, rows, source, out)
    if entry.train and rows.task in ("token-classification", "sentence-embedding"):
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
    reader: inputs.Reader = inputs.PixelReader(math.prod(rows.shape))
    if not isinstance(how, ImageSpec):
        _save_tokenizer(source, out)
        reader = TextReader(out, entry.max_length, entry.too_long)
    words = rows.task == "token-classification"
    # All of them: what is too long is said before work starts.
    tokens = inputs.read(reader, rows, words)
    if entry.train:
        model, done = _fine_tune(name, entry.train, source, rows, tokens, reader.pad_id, how)
        model.save_pretrained(out)
    else:
        model, done = teachers.load(source, task=rows.task, how=how, pad_token_id=reader.pad_id), None
        _try_extremes(model, tokens, reader.pad_id)
        for file in [source / "config.json", *sorted(source.glob("*.safetensors*"))]:
            _link(file, out / file.name)
    names = () if not rows.label_names else teachers.labels(out, entry.labels, rows.label_names)
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
        **_quality(model, rows, tokens, reader.pad_id, names),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": done._asdict() if done else None,
    }
    if entry.train and entry.train.lora:
        record["lora"] = entry.train.lora.model_dump(mode="json")
    if how is not None:
        record["image" if isinstance(how, ImageSpec) else "embedding"] = how.model_dump(mode="json")
    (out / teachers.RECORD).write_text(json.dumps(record, indent=2) + "\n")
    if "accuracy" in record:
        log(f"{name}: {record['accuracy']['test']:.1%} of the test {'words' if words else 'rows'} right")
    else:
        log(f"{name}: {record['quality']['test'] or 'taken as it is'}")
    return record


def _how(name: str, entry: config_teachers.Teacher, source: Path, rows: Rows) -> teachers.How | None:
    """How it reads images or makes vectors; None in all other tasks."""
    if rows.task == "image-classification":
        from pipeline.image_models import how_read  # transformers, some seconds

        return how_read(source, rows.shape)
    if rows.task != "sentence-embedding":
        return None
    width = json.loads((source / "config.json").read_text()).get("hidden_size")
    if width is None:
        raise TeacherError(f"teachers.{name}: {source}/config.json has no hidden_size: how wide is a vector?")
    return how_made(name, source, entry.embedding, width)


def _take_language_model(
    name: str, entry: config_teachers.Teacher, rows: Rows, source: Path, out: Path
) -> dict[str, Any]:
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
        teachers.from_gguf(packed[0], out)
        _only_tokenizer_and_weights(out)
    else:
        _save_tokenizer(source, out)
        for file in [source / "config.json", *sorted(source.glob("*.safetensors*"))]:
            _link(file, out / file.name)
    reader = TextReader(out, entry.max_length, entry.too_long)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    mask = targets.mask(rows.task, None)
    read = prompts(rows.task, mask, tokens, rows.row_ids, reader.special)
    truth = tokens.ids if mask else np.roll(tokens.ids, -1)
    model = teachers.load_language(out, hardware.precision("auto"), rows.task)
    head = language.LanguageHead(model, min(reader.num_ids, model.config.get_text_config().vocab_size))
    language.mass(head, read, _extremes(tokens), reader.pad_id)
    seen = language.score(head, read, truth, rows.select("test"), reader.pad_id)
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
    (out / teachers.RECORD).write_text(json.dumps(record, indent=2) + "\n")
    log(f"{name}: perplexity {np.exp(seen.loss):.1f} on the test rows")
    return record


def _fine_tune(
    name: str, train: config_teachers.TeacherTraining, source: Path, rows: Rows, tokens: Inputs, pad_id: int,
    how: teachers.How | None,
) -> "tuple[PreTrainedModel, Fit]":  # fmt: skip
    torch.manual_seed(train.seed)
    task = row_tasks.of(rows.task)
    changes: dict[str, Any] = {} if train.dropout is None else {
        "hidden_dropout_prob": train.dropout, "attention_probs_dropout_prob": train.dropout
    }  # fmt: skip
    changes["id2label"] = dict(enumerate(rows.label_names))
    changes["label2id"] = {n: i for i, n in enumerate(rows.label_names)}
    if rows.task in PROBLEMS:
        changes["problem_type"] = PROBLEMS[rows.task]
    model = teachers.load(source, len(rows.label_names), rows.task, how, pad_token_id=pad_id, **changes)
    _try_extremes(model, tokens, pad_id)
    if train.frozen_layers is not None:
        _freeze(name, model, train.frozen_layers)
    learner = adapters.adapted(name, model, train.lora) if train.lora else model
    chosen, truth = rows.select("train"), rows.truth

    def batches(epoch: int) -> Iterator[DistillBatch]:
        for part in order.batches(
            tokens.lengths[chosen], train.batch_rows, BUCKET_BATCHES, train.seed, epoch
        ):
            ids, mask = (torch.from_numpy(array) for array in tokens.padded(chosen[part], pad_id))
            labels = torch.from_numpy(truth[chosen[part]])
            yield DistillBatch(ids, mask, labels, torch.zeros(len(part), 0))

    settings = Settings(
        epochs=train.epochs,
        steps=train.epochs * -(-len(chosen) // train.batch_rows),
        learning_rate=train.learning_rate,
        warmup=train.warmup,
        weight_decay=train.weight_decay,
        evaluations_per_epoch=train.evaluations_per_epoch,
        patience=train.patience,
        bfloat16=hardware.precision(train.precision) == "bfloat16",
        by_loss=task.by_loss,
    )
    with bar(f"fine-tuning {name}", train.epochs * len(chosen), "rows") as advance:
        done = fit(
            _Classifier(learner), batches,
            lambda net, batch, _: task.label_loss(net(batch.ids_BL, batch.mask_BL), batch.labels_T),
            lambda _: _validation(model, rows, tokens, pad_id), settings, advance,
        )  # fmt: skip
    return (adapters.merged(learner) if train.lora else model), done


def _freeze(name: str, model: "PreTrainedModel", num_layers: int) -> None:
    """Take the embeddings and the first layers out of training."""
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = next((s for s in stacks if len(s) == getattr(model.config, "num_hidden_layers", None)), None)
    if layers is None or num_layers > len(layers):
        raise TeacherError(
            f"teachers.{name}.train.frozen_layers: {num_layers} layers cannot be frozen, "
            f"{'the model has ' + str(len(layers)) if layers else 'its layers are not found'}."
        )
    for module in (model.get_input_embeddings(), *layers[:num_layers]):
        module.requires_grad_(False)


def _try_extremes(model: "PreTrainedModel", tokens: Inputs, pad_id: int) -> None:
    if not isinstance(tokens, Tokens):  # images are all alike
        engine.infer(model, tokens, np.zeros(1, np.int64), pad_id, "float32")
    elif tokens.words is None:
        engine.infer(model, tokens, _extremes(tokens), pad_id, "float32")
    else:
        engine.infer_tokens(model, tokens, _extremes(tokens), pad_id, "float32")


def _extremes(tokens: Tokens) -> npt.NDArray[np.int64]:
    """The longest row and the one with the largest token id: better refused now than after hours."""
    largest = int(np.searchsorted(tokens.offsets, tokens.ids.argmax(), side="right")) - 1
    return np.array([int(tokens.lengths.argmax()), largest])


class _Classifier(torch.nn.Module):
    """A transformers classifier with the students' signature."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        logits_BC: torch.Tensor = self.model(input_ids=ids_BL, attention_mask=mask_BL.long()).logits
        return logits_BC


def _validation(model: "PreTrainedModel", rows: Rows, tokens: Inputs, pad_id: int) -> Validation:
    chosen = rows.select("validation")
    said = torch.from_numpy(engine.infer(model, tokens, chosen, pad_id, "float32").logits)
    return row_tasks.of(rows.task).look(said, torch.from_numpy(rows.truth[chosen]), None)


def _quality(
    model: "PreTrainedModel", rows: Rows, tokens: Inputs, pad_id: int, names: tuple[str, ...]
) -> dict[str, Any]:
    """How good it is on the test split: accuracy where there are classes, else the metrics of the task."""
    if rows.task not in row_tasks.TASKS:
        return {"accuracy": {"test": _score(model, rows, tokens, pad_id, names, "test")}}
    if not names:
        return {"quality": {"test": {}}}
    said, truth = where_labelled(model, rows, tokens, rows.select("test"), pad_id)
    order = [names.index(label) for label in rows.label_names]
    return {"quality": {"test": row_tasks.of(rows.task).quality(said[:, order], truth)}}


def _score(
    model: "PreTrainedModel", rows: Rows, tokens: Inputs, pad_id: int, names: tuple[str, ...], split: str
) -> float:
    """Accuracy on a split, by label name: the teacher's order of labels may be another."""
    logits, labels = where_labelled(model, rows, tokens, rows.select(split), pad_id)
    said: npt.NDArray[np.str_] = np.array(names)[logits.argmax(1)]
    return float((said == np.array(rows.label_names)[labels]).mean())


def _save_tokenizer(source: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source, **teachers.OFFLINE).save_pretrained(out)
    except (OSError, ValueError) as error:
        raise TeacherError(f"the tokenizer in {source} cannot be loaded: {error}") from error
    _only_tokenizer_and_weights(out)


def _only_tokenizer_and_weights(out: Path) -> None:
    for extra in out.iterdir():
        if extra.name not in (*FILES, "config.json") and ".safetensors" not in extra.name:
            extra.unlink()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
