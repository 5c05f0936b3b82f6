"""A batch as a plain dict of tensors, which the trainers of other libraries move and read, and its way back.

    input_ids       int64 [B, L]     padded on the right; of images pixel_values, float32 [B, K, H, W]
    attention_mask  int64 [B, L]     1 for tokens, 0 for padding
    labels          int64 [B], or [B, L] with a target for each token; -100 for no label
                    float32 [B, C]   several labels or numbers a row; nan for no label
    shift_labels    with a target for each token: the same tensor as labels
    targets         a dict with one of these three:
        logits                      float32 [B, C], at temperature 1; numbers and vectors too
        logits, teacher_weights     float32 [M, B, C] and [M], of M teachers: how much each counts
        positions, ids, weights     int64, int64 and float32 [E]: entries, probabilities at temperature 1;
                                    `positions` ascend and number the T targets, row after row
                    and with some of:
        log_tail                    float32 [T], of top-k entries: log mass of all other ids. Entries that
                                    were drawn at random have none
        mask                        bool [B, L], with a target for each token: where the T targets are
        shares                      float64 [2], of one of several ranks: what the means over its targets and
                                    over its labels count among those of all ranks
        hidden                      a dict of the states that were requested, by name: float32 [B, W], or
                                    [T, W] with a state for each token

Labels of tokens are the next tokens already: labels[b, t] is the id of the token after input_ids[b, t]. A
model of transformers that is given `labels` alone shifts them by one; given `shift_labels` too, it does not.

Shape letters: B batch, L tokens, C classes, T targets: of B rows, or of their true tokens, row after row.
E entries, M teachers, K channels, H height, W width (of an image, or of a state).
"""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.data.rows import NO_LABEL
from pipeline.losses.divergences import MixedTargets
from pipeline.losses.sparse import SparseTargets
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import for_transformers, normalised_images
from storage.spec import Spec

IGNORED = -100  # what transformers calls a position without a label

PlainBatch = dict[str, Any]  # tensors, and dicts of tensors


def plain_batch(batch: DistillBatch, spec: Spec) -> PlainBatch:
    """A batch of a cache with this spec in the layout above."""
    inputs = for_transformers(batch.inputs)
    if spec.image is not None:
        inputs["pixel_values"] = normalised_images(inputs["pixel_values"], spec.image)
    targets = _targets(batch, spec.sampled)
    if batch.hidden:
        targets["hidden"] = dict(batch.hidden)
    if batch.whole is not None:
        targets["shares"] = torch.tensor(batch.shares, dtype=torch.float64)
    labels = outer_labels(batch.labels_T)
    if not spec.per_position:
        return {**inputs, "labels": labels, "targets": targets}
    targets["mask"] = batch.mask
    labels_BL = torch.full(batch.mask.shape, IGNORED, dtype=labels.dtype)
    labels_BL[batch.mask] = labels
    return {**inputs, "labels": labels_BL, "shift_labels": labels_BL, "targets": targets}


def outer_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels as they are outside: no class is -100. Numbers stay: none are nan."""
    return labels if labels.is_floating_point() else labels.masked_fill(labels == NO_LABEL, IGNORED)


def inner_labels(labels: torch.Tensor) -> torch.Tensor:
    """The inverse of `outer_labels`."""
    return labels if labels.is_floating_point() else labels.masked_fill(labels == IGNORED, NO_LABEL)


def read_targets(
    targets: Mapping[str, torch.Tensor], num_targets: int
) -> torch.Tensor | SparseTargets | MixedTargets:
    """The targets of a plain batch as losses take them. `num_targets`: T."""
    if "teacher_weights" in targets:
        return MixedTargets(targets["logits"], targets["teacher_weights"])
    if "logits" in targets:
        return targets["logits"]
    weights = targets["weights"]
    log_tail = targets.get("log_tail")
    if log_tail is None:
        log_tail = weights.new_full((num_targets,), -torch.inf)
    return SparseTargets(targets["positions"], targets["ids"], weights, log_tail)


def _targets(batch: DistillBatch, sampled: bool) -> PlainBatch:
    teacher = batch.teacher
    if isinstance(teacher, torch.Tensor):
        return {"logits": teacher}
    if isinstance(teacher, MixedTargets):
        return {"logits": teacher.logits, "teacher_weights": teacher.weights}
    entries = {"positions": teacher.positions, "ids": teacher.ids, "weights": teacher.weights}
    return entries if sampled else entries | {"log_tail": teacher.log_tail}
