"""Fine-tunes a teacher on labelled rows, by the loop that trains students."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.config.teachers import TeacherTraining
from pipeline.engines.loading import ReadingSpec, load_classifier
from pipeline.objectives.base import Validation
from pipeline.objectives.registry import objective_of
from pipeline.runtime import hardware
from pipeline.runtime.progress import bar
from pipeline.streaming.batch import BUCKET_BATCHES, DistillBatch
from pipeline.streaming.model_inputs import for_transformers, input_tensors
from pipeline.teachers.adapters import merge_adapters, with_adapters
from pipeline.teachers.extremes import try_extremes
from pipeline.teachers.scoring import TeacherRows
from pipeline.training.job import Fit
from pipeline.training.loop import TrainingFunctions, TrainingSettings, fit
from storage import order
from storage.errors import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fine_tune(
    name: str, train: TeacherTraining, source: Path, teacher_rows: TeacherRows, reading: ReadingSpec | None
) -> "tuple[PreTrainedModel, Fit]":
    """The fine-tuned model, and what training did. Raises TeacherError where the model cannot be trained."""
    torch.manual_seed(train.seed)
    rows, inputs, objective = teacher_rows.rows, teacher_rows.inputs, objective_of(teacher_rows.rows.task)
    model = _load(train, source, teacher_rows, reading)
    try_extremes(model, teacher_rows)
    if train.frozen_layers is not None:
        _freeze(name, model, train.frozen_layers)
    learner = with_adapters(name, model, train.lora) if train.lora else model
    chosen, truth = rows.select("train"), rows.truth

    def batches(epoch: int) -> Iterator[DistillBatch]:
        lengths = inputs.lengths[chosen]
        for part in order.batches(lengths, train.batch_rows, BUCKET_BATCHES, train.seed, epoch):
            tensors = input_tensors(inputs.padded(chosen[part], teacher_rows.pad_id))
            yield DistillBatch(tensors, torch.from_numpy(truth[chosen[part]]), torch.zeros(len(part), 0))

    settings = TrainingSettings(
        epochs=train.epochs,
        steps=train.epochs * -(-len(chosen) // train.batch_rows),
        learning_rate=train.learning_rate,
        warmup=train.warmup,
        weight_decay=train.weight_decay,
        evaluations_per_epoch=train.evaluations_per_epoch,
        patience=train.patience,
        bfloat16=hardware.precision(train.precision) == "bfloat16",
        by_loss=objective.by_loss,
    )
    with bar(f"fine-tuning {name}", train.epochs * len(chosen), "rows") as advance:
        functions = TrainingFunctions(
            batches,
            lambda net, batch, _: objective.label_loss(net(**batch.inputs), batch.labels_T),
            lambda _: _validate(model, teacher_rows),
        )
        done = fit(_Classifier(learner), functions, settings, advance)
    return (merge_adapters(learner) if train.lora else model), done


def _load(
    train: TeacherTraining, source: Path, teacher_rows: TeacherRows, reading: ReadingSpec | None
) -> "PreTrainedModel":
    """The model with a head for the dataset's labels."""
    rows, changes = teacher_rows.rows, dict[str, Any]()
    if train.dropout is not None:
        changes |= {"hidden_dropout_prob": train.dropout, "attention_probs_dropout_prob": train.dropout}
    changes["id2label"] = dict(enumerate(rows.label_names))
    changes["label2id"] = {label: index for index, label in enumerate(rows.label_names)}
    if rows.task_spec.problem_type:
        changes["problem_type"] = rows.task_spec.problem_type
    return load_classifier(
        source, len(rows.label_names), rows.task, reading, pad_token_id=teacher_rows.pad_id, **changes
    )


def _freeze(name: str, model: "PreTrainedModel", num_layers: int) -> None:
    """Exclude the embeddings and the first layers from training."""
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    layers = next((s for s in stacks if len(s) == getattr(model.config, "num_hidden_layers", None)), None)
    if layers is None or num_layers > len(layers):
        raise TeacherError(
            f"teachers.{name}.train.frozen_layers: {num_layers} layers cannot be frozen, "
            f"{'the model has ' + str(len(layers)) if layers else 'its layers are not found'}."
        )
    for module in (model.get_input_embeddings(), *layers[:num_layers]):
        module.requires_grad_(False)


class _Classifier(torch.nn.Module):
    """A transformers classifier that returns its logits, as students do."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        logits_BC: torch.Tensor = self.model(**for_transformers(inputs)).logits
        return logits_BC


def _validate(model: "PreTrainedModel", teacher_rows: TeacherRows) -> Validation:
    chosen = teacher_rows.rows.select("validation")
    logits_NC = torch.from_numpy(teacher_rows.infer(model, chosen))
    return objective_of(teacher_rows.rows.task).validate(
        logits_NC, torch.from_numpy(teacher_rows.rows.truth[chosen]), None
    )
