"""What a student of a task is trained with: its batches, its loss, and how it is looked at on the way.

A lesson is all that `training.fit` needs to know of a task. Rows with one target (classifiers) and rows with
a target a token (language models) each have one.

Shape letters: B batch, L tokens, C classes, T targets, D width of a state.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple, cast

import torch

from pipeline.config.recipes import Recipe
from pipeline.config.schedules import ByConfidence, value_at
from pipeline.config.students import Student
from pipeline.data.inputs import Reader, read_inputs
from pipeline.data.rows import POOL, VIEWS, Rows
from pipeline.losses.divergences import MixedTargets, confidence_temperature
from pipeline.losses.fused_linear import head_loss, mix_labels
from pipeline.losses.sparse import SparseTargets
from pipeline.objectives.base import SoftLossSettings, Validation, mix
from pipeline.objectives.classification import pseudo_labels
from pipeline.objectives.language_model import BY_LOSS, score_documents
from pipeline.objectives.registry import objective_of
from pipeline.streaming.batch import ALONE, DistillBatch, Stream
from pipeline.streaming.decoded_shards import SCRATCH, DecodedShards
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.model_inputs import call_model, on_device, unwrapped
from pipeline.streaming.rows import CachedRows
from pipeline.students.base import LanguageModelStudent, StudentModel
from pipeline.training.feature_matching import MatchedStudent, validate_matching
from pipeline.training.layer_maps import resolve_layers
from storage import Cache

EVALUATION_ROWS = 256
VALIDATION_TOKENS = 4096  # a batch


class Workload(NamedTuple):
    """A task, as the training loop sees it."""

    num_outputs: int  # classes, or ids of the vocabulary
    num_targets: int  # of an epoch: what `advance` counts to
    steps: int  # of all epochs
    batches: Callable[..., Generator[Any, None, None]]  # of an epoch (from the start-th on)
    loss: Callable[[torch.nn.Module, Any, float], torch.Tensor]  # of such a batch; done: see training.fit
    validate: Callable[[torch.nn.Module], Validation]
    by_loss: bool  # what the best state is chosen by
    cut_rows: int  # rows that lost tokens to the student's maximum
    padding: tuple[float, float] | None  # share of padding, with and without rows sorted by length
    rows_a_piece: float  # of what a batch has: whole rows, or pieces of longer ones
    dress: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model  # with what helps it learn


def training_splits(recipe: Recipe) -> tuple[str, ...]:
    """The splits that a recipe trains on."""
    if recipe.pool == "only":
        return (POOL,)
    return ("train", *((POOL,) if recipe.pool else ()), *((VIEWS,) if recipe.views else ()))


def rows_workload(
    student: Student,
    recipe: Recipe,
    cache: Cache,
    rows: Rows,
    reader: Reader,
    seed: int,
    stream: Stream = ALONE,
) -> Workload:
    """That of a target a row: the answer to each row against its label and its cached target."""
    tokens, objective = read_inputs(reader, rows), objective_of(cache.identity.spec.task)
    match, hidden = recipe.match, cache.identity.spec.hidden
    plan = resolve_layers("this run", match, student, hidden) if match else None
    names = plan.names if plan else ()
    cached = CachedRows(cache, rows, tokens, reader.pad_id, training_splits(recipe), names, stream)
    looked_at = () if recipe.predicts else names
    held_out = CachedRows(cache, rows, tokens, reader.pad_id, ("validation",), looked_at)
    sampled = cache.identity.spec.sampled

    def dress(model: torch.nn.Module) -> torch.nn.Module:
        if not (match and plan and hidden):
            return model
        return MatchedStudent(cast(StudentModel, model), match, plan, hidden)

    def predictions_loss(student: torch.Tensor, batch: DistillBatch, done: float) -> torch.Tensor:
        labels_T = batch.labels_T
        if recipe.pseudo_labels:
            labels_T = pseudo_labels(labels_T, _logits(batch.teacher, len(cache.labels)))

        def label_loss() -> torch.Tensor:
            return objective.label_loss(student, labels_T)

        def soft_loss() -> torch.Tensor:
            temperature = _temperature(recipe, batch, done)
            settings = SoftLossSettings(temperature, recipe.divergence, recipe.skew, sampled)
            return objective.soft_loss(student, batch.teacher, settings)

        alpha, (share, label_share) = value_at(recipe.alpha, done), batch.shares
        if recipe.pseudo_labels:
            label_share = share  # every row has a label then
        if share != label_share:  # a rank's part of a batch
            return mix(alpha, label_loss, soft_loss, label_share, share)
        loss = mix(alpha, label_loss, soft_loss)
        return share * loss if batch.whole else loss

    def loss(model: torch.nn.Module, batch: DistillBatch, done: float) -> torch.Tensor:
        if match is None:
            return predictions_loss(call_model(model, batch.inputs), batch, done)
        output = cast(MatchedStudent, unwrapped(model)).match(batch, done)
        if not recipe.predicts:
            return output.loss
        predictions = predictions_loss(output.logits_BC, batch, done)
        return value_at(match.prediction, done) * predictions + output.loss

    def validate(model: torch.nn.Module) -> Validation:
        if not recipe.predicts:
            matched = cast(MatchedStudent, unwrapped(model))
            return validate_matching(matched, held_out.in_order(EVALUATION_ROWS), objective.validate)
        said, teacher, truth = predict_all(model, held_out)
        return objective.validate(said, truth, teacher)

    return Workload(
        num_outputs=cache.identity.spec.num_outputs,
        num_targets=cached.num_rows,
        steps=recipe.epochs * cached.num_batches(recipe.batch_rows),
        batches=lambda epoch, start=0: cached.epoch(seed, epoch, recipe.batch_rows, start),
        loss=loss,
        validate=validate,
        by_loss=objective.by_loss or not recipe.predicts,
        cut_rows=tokens.num_cut,
        padding=None,
        rows_a_piece=1.0,
        dress=dress,
    )


def documents_workload(
    max_length: int,
    recipe: Recipe,
    cache: Cache,
    rows: Rows,
    seed: int,
    stream: Stream = ALONE,
) -> Workload:
    """A language model's: states of each token through the head, against the next token and the entries.

    Documents are read in pieces of at most `max_length` tokens.
    """
    spool = DecodedShards(SCRATCH, stream.decoded_bytes)  # rows of both lie in the same shards
    cached = CachedDocuments(cache, rows, training_splits(recipe), max_length, stream=stream, spool=spool)
    held_out = CachedDocuments(cache, rows, ("validation",), max_length, spool=spool)
    sampled = cache.identity.spec.sampled

    def validate(model: torch.nn.Module) -> Validation:
        return score_documents(model, held_out.in_order(VALIDATION_TOKENS)).validation

    return Workload(
        num_outputs=cache.identity.spec.num_outputs,
        num_targets=cached.num_targets,
        steps=cached.num_steps(seed, recipe.epochs, recipe.batch_tokens),
        batches=lambda epoch, start=0: cached.epoch(seed, epoch, recipe.batch_tokens, start),
        loss=lambda model, batch, done: language_loss(model, batch, value_at(recipe.alpha, done), sampled),
        validate=validate,
        by_loss=BY_LOSS,
        cut_rows=0,
        padding=cached.padding(seed, recipe.batch_tokens),
        rows_a_piece=cached.num_rows / max(cached.num_pieces, 1),
    )


def _temperature(recipe: Recipe, batch: DistillBatch, done: float) -> float | torch.Tensor:
    """The recipe's temperature at this step: one for the batch, or one a row [B, 1]."""
    if isinstance(recipe.temperature, ByConfidence):
        teacher = _averaged(batch.teacher)
        assert isinstance(teacher, torch.Tensor)  # entries were refused: targets.refuse_truncated
        return confidence_temperature(teacher, recipe.temperature.low, recipe.temperature.high)
    return value_at(recipe.temperature, done)


def _averaged(targets: torch.Tensor | SparseTargets | MixedTargets) -> torch.Tensor | SparseTargets:
    """The targets of one teacher, or of the mean of several at temperature 1."""
    return targets.at(1.0) if isinstance(targets, MixedTargets) else targets


def language_loss(model: torch.nn.Module, batch: DistillBatch, alpha: float, sampled: bool) -> torch.Tensor:
    """alpha CE + (1 - alpha) soft, in nats, mean over tokens; the head runs in the dtype of autocast.

    soft is sum w log(1 / p) on sampled entries, and with a bucket for the rest on top-k: the KL up to a
    constant of the targets.
    """
    assert isinstance(batch.teacher, SparseTargets)  # documents have no others
    states_TD = call_model(model, batch.inputs)[batch.mask]
    head_VD = cast(LanguageModelStudent, unwrapped(model)).head
    if torch.is_autocast_enabled(states_TD.device.type):  # the kernel computes in what it is given
        states_TD, head_VD = states_TD.bfloat16(), head_VD.bfloat16()
    targets = batch.teacher
    if sampled:  # labels are entries too: one pass over the head
        loss = head_loss(states_TD, head_VD, mix_labels(batch.labels_T, targets, alpha))
    else:
        labels = mix_labels(batch.labels_T, targets, 1.0)
        loss = mix(
            alpha,
            lambda: head_loss(states_TD, head_VD, labels),
            lambda: head_loss(states_TD, head_VD, targets, bucket=True),
        )
    loss = loss / len(states_TD)
    return batch.shares[0] * loss if batch.whole else loss


def predict_all(
    model: torch.nn.Module, cached: CachedRows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(student logits [N, C], teacher logits [N, C], labels [N]) of all rows, in one order.

    Entries of a sparse cache count as `SparseTargets.logits` has them, several teachers as their mean.
    """
    device = next(model.parameters()).device
    said, teacher, labels = [], [], []
    with torch.inference_mode():
        for batch in cached.in_order(EVALUATION_ROWS):
            said.append(call_model(model, on_device(batch.inputs, device)).cpu())
            teacher.append(_logits(batch.teacher, said[-1].shape[1]))
            labels.append(batch.labels_T)
    return torch.cat(said), torch.cat(teacher), torch.cat(labels)


def _logits(targets: torch.Tensor | SparseTargets | MixedTargets, num_classes: int) -> torch.Tensor:
    """Targets of a batch as logits [B, C], whatever the cache holds."""
    teacher = _averaged(targets)
    return teacher if isinstance(teacher, torch.Tensor) else teacher.logits(num_classes)
