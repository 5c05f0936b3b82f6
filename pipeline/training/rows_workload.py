"""The workload of a cache with one target a row: outputs against labels, cached targets and hidden states.

Shape letters: B batch, T targets: one for each row, N rows, C classes.
"""

from typing import NamedTuple, cast

import torch

from pipeline.config.recipes import Recipe
from pipeline.config.schedules import ByConfidence, value_at
from pipeline.config.students import StudentSection
from pipeline.data.inputs import read_inputs
from pipeline.losses.divergences import MixedTargets, confidence_temperature
from pipeline.losses.sparse import SparseTargets
from pipeline.objectives.base import SoftLossSettings, Targets, Validation, mix_part
from pipeline.objectives.classification import pseudo_labels
from pipeline.objectives.registry import objective_of
from pipeline.streaming.batch import ALONE, DistillBatch, Stream
from pipeline.streaming.model_inputs import call_model, on_device, unwrapped
from pipeline.streaming.rows import CachedRows
from pipeline.students.base import StudentModel
from pipeline.training.feature_matching import MatchedStudent, validate_matching
from pipeline.training.layer_maps import resolve_layers
from pipeline.training.workload import TrainingData, Workload, training_splits

EVALUATION_ROWS = 256  # a batch


def rows_workload(
    student: StudentSection, recipe: Recipe, data: TrainingData, seed: int, stream: Stream = ALONE
) -> Workload:
    """The workload of rows: what `student` learns from `data` by `recipe`."""
    training = _RowsTraining(student, recipe, data, stream)
    return training.workload(seed)


class _RowsTraining:
    """Losses and validation of one training."""

    def __init__(self, student: StudentSection, recipe: Recipe, data: TrainingData, stream: Stream) -> None:
        cache, rows, reader = data
        inputs, self._hidden = read_inputs(reader, rows), cache.identity.spec.hidden
        self._recipe, self._spec, self._num_cut = recipe, cache.identity.spec, inputs.num_cut
        self._num_labels, self._objective = len(cache.labels), objective_of(self._spec.task)
        self._plan = resolve_layers("this run", recipe.match, student, self._hidden) if recipe.match else None
        names = self._plan.names if self._plan else ()
        splits, validated = training_splits(recipe), () if recipe.predicts else names
        self._cached = CachedRows(cache, rows, inputs, reader.pad_id, splits, names, stream)
        self._held_out = CachedRows(cache, rows, inputs, reader.pad_id, ("validation",), validated)

    def workload(self, seed: int) -> Workload:
        """The same as a Workload."""
        recipe, cached = self._recipe, self._cached
        return Workload(
            num_outputs=self._spec.num_outputs,
            num_targets=cached.num_rows,
            steps=recipe.epochs * cached.num_batches(recipe.batch_rows),
            batches=lambda epoch, start=0: cached.epoch(seed, epoch, recipe.batch_rows, start),
            loss=self.loss,
            validate=self.validate,
            by_loss=self._objective.by_loss or not recipe.predicts,
            cut_rows=self._num_cut,
            padding=None,
            rows_per_item=1.0,
            wrap=self.wrap,
        )

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The student with the projections of its recipe's `match`."""
        match, plan, hidden = self._recipe.match, self._plan, self._hidden
        if not (match and plan and hidden):
            return model
        return MatchedStudent(cast(StudentModel, model), match, plan, hidden)

    def loss(self, model: torch.nn.Module, batch: DistillBatch, done: float) -> torch.Tensor:
        """The recipe's loss, where this share of the training is done."""
        match = self._recipe.match
        if match is None:
            return self._prediction_loss(call_model(model, batch.inputs), batch, done)
        output = cast(MatchedStudent, unwrapped(model)).match(batch, done)
        if not self._recipe.predicts:
            return output.loss
        predictions = self._prediction_loss(output.logits_BC, batch, done)
        return value_at(match.prediction, done) * predictions + output.loss

    def validate(self, model: torch.nn.Module) -> Validation:
        """The objective's validation; of hidden states alone, the matching loss."""
        if not self._recipe.predicts:
            matched = cast(MatchedStudent, unwrapped(model))
            batches = self._held_out.in_order(EVALUATION_ROWS)
            return validate_matching(matched, batches, self._objective.validate)
        student, teacher, labels = predict_all(model, self._held_out)
        return self._objective.validate(student, labels, teacher)

    def _prediction_loss(
        self, student_logits: torch.Tensor, batch: DistillBatch, done: float
    ) -> torch.Tensor:
        recipe, labels_T = self._recipe, batch.labels_T
        if recipe.pseudo_labels:
            labels_T = pseudo_labels(labels_T, _logits(batch.teacher, self._num_labels))

        def label_loss() -> torch.Tensor:
            return self._objective.label_loss(student_logits, labels_T)

        def soft_loss() -> torch.Tensor:
            temperature = _temperature(recipe, batch, done)
            settings = SoftLossSettings(temperature, recipe.divergence, recipe.skew, self._spec.sampled)
            return self._objective.soft_loss(student_logits, batch.teacher, settings)

        alpha, shares = value_at(recipe.alpha, done), batch.shares
        if recipe.pseudo_labels:
            shares = shares[0], shares[0]  # every row has a label then
        return mix_part(alpha, label_loss, soft_loss, shares if batch.whole else None)


def _temperature(recipe: Recipe, batch: DistillBatch, done: float) -> float | torch.Tensor:
    """The recipe's temperature at this step: one for the batch, or one a row [B, 1]."""
    if isinstance(recipe.temperature, ByConfidence):
        teacher = _averaged(batch.teacher)
        assert isinstance(teacher, torch.Tensor)  # entries were refused: checks.check_truncated
        return confidence_temperature(teacher, recipe.temperature.low, recipe.temperature.high)
    return value_at(recipe.temperature, done)


class Predictions(NamedTuple):
    """Outputs for N rows, in one order."""

    student: torch.Tensor  # N x C
    teacher: torch.Tensor  # N x C
    labels: torch.Tensor  # N, or numbers N x C


def predict_all(model: torch.nn.Module, cached: CachedRows) -> Predictions:
    """The outputs of student and teacher for all rows.

    Entries of a sparse cache count as `SparseTargets.logits` has them, several teachers as their mean.
    """
    device = next(model.parameters()).device
    student, teacher, labels = [], [], []
    with torch.inference_mode():
        for batch in cached.in_order(EVALUATION_ROWS):
            student.append(call_model(model, on_device(batch.inputs, device)).cpu())
            teacher.append(_logits(batch.teacher, student[-1].shape[1]))
            labels.append(batch.labels_T)
    return Predictions(torch.cat(student), torch.cat(teacher), torch.cat(labels))


def _averaged(targets: Targets) -> torch.Tensor | SparseTargets:
    """The targets of one teacher, or of the mean of several at temperature 1."""
    return targets.at(1.0) if isinstance(targets, MixedTargets) else targets


def _logits(targets: Targets, num_classes: int) -> torch.Tensor:
    """Targets of a batch as logits [B, C], whatever the cache holds."""
    teacher = _averaged(targets)
    return teacher if isinstance(teacher, torch.Tensor) else teacher.logits(num_classes)
