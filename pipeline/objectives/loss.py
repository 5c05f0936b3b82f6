"""The loss of a run as a torch module, for other people's training loops.

    loss = DistillationLoss(alpha=0.5, temperature=2.0)
    loss(logits, labels, targets)                 # labels and targets as CachedDataset gives them
    loss.linear(states, head, labels, targets)    # of a large vocabulary: the logits are never built whole

Shape letters: B batch, L tokens, C classes or ids of the vocabulary, T targets: of B rows, or of their true
tokens, row after row. D width of a state, E entries.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pipeline.config.recipes import ONLY_FORWARD, UNTEMPERED
from pipeline.config.tasks import DEFAULT_TASK, ROW_OBJECTIVES, TASKS
from pipeline.data.rows import NO_LABEL
from pipeline.losses.divergences import MixedTargets
from pipeline.losses.fused_linear import head_loss, mix_labels
from pipeline.losses.sparse import SparseTargets
from pipeline.objectives.base import Objective, SoftLossSettings, Targets, mix_part
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.objectives.language_model import HeadInputs, fused_loss
from pipeline.objectives.registry import objective_of
from pipeline.streaming.plain_batch import inner_labels, read_targets
from storage.errors import ConfigError, DataError, Mismatch, SpecMismatch
from storage.tasks import Task

ENTRIES = ("positions", "ids", "weights")


class DistillationLoss(torch.nn.Module):
    """alpha label loss + (1 - alpha) soft loss: the loss of a run with this recipe, in nats (of numbers a
    squared error, of vectors a distance).

    The label loss is a mean over labelled rows or tokens, the soft loss a mean over all. The attributes may
    be changed between steps, as a schedule does.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        temperature: float = 1.0,
        divergence: str | None = None,
        skew: float = 0.1,
        task: Task = DEFAULT_TASK,
    ) -> None:
        """`alpha`, `temperature`, `divergence`, `skew`: as in a recipe. `task`: as in a dataset; needed for
        several labels, numbers or vectors a row. Without a divergence: the first one that the task has.

        Raises ConfigError for what the task does not have.
        """
        super().__init__()
        row = TASKS.get(task)
        if row is None:
            raise ConfigError(f"task: {task!r}, expected one of {', '.join(TASKS)}.")
        self.alpha, self.temperature, self.skew, self.task = alpha, temperature, skew, task
        self.divergence = divergence or row.divergences[0]
        self._objective: Objective = objective_of(task) if row.objective in ROW_OBJECTIVES else CLASSIFICATION
        self._checked_outputs: int | None = None  # number of outputs that ids were compared with
        self._check_settings()

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, targets: Mapping[str, Any]) -> torch.Tensor:
        """The loss, a scalar. `logits` [B, C], or [B, L, C] where targets have a mask: of each token, as the
        model returns them. `labels` and `targets` as plain_batch.py describes them; labels of tokens are
        the next tokens already, so nothing is shifted here.

        Raises DataError for shapes that do not belong together, SpecMismatch for targets that these settings
        do not fit.
        """
        self._check_settings()
        part = self._part("logits", logits, labels, targets)
        settings = SoftLossSettings(self.temperature, self.divergence, self.skew, part.sampled)
        return mix_part(
            self.alpha,
            lambda: self._objective.label_loss(part.outputs, part.labels),
            lambda: self._objective.soft_loss(part.outputs, part.targets, settings),
            part.shares,
        )

    def linear(
        self,
        states: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        targets: Mapping[str, Any],
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of the logits states @ head.T + bias, which are never built whole: what a run of a
        language model minimises. `states` [B, L, D] (without a mask [B, D]), `head` [C, D], `bias` [C].

        Targets are entries, the temperature is 1. The soft part leaves out the constant sum w log w of the
        targets, so it is larger than that of `forward`; gradients are the same.
        """
        self._check_settings()
        part = self._part("states", states, labels, targets, num_outputs=len(head))
        if not isinstance(part.targets, SparseTargets):
            raise SpecMismatch(
                "dense targets have no fused loss",
                [Mismatch("targets", sorted(targets), list(ENTRIES))],
                "Build the logits, and call the loss with them: they are as large as the targets.",
            )
        if self.alpha < 1 and self.temperature != 1:
            raise ConfigError(
                f"the fused loss has no temperature: found {self.temperature}, expected 1.\n"
                "Set temperature to 1, or call the loss with logits."
            )
        inputs, sparse = HeadInputs(part.outputs, head, bias), part.targets
        if self.alpha == 0 or bool((part.labels != NO_LABEL).all()):
            loss = fused_loss(inputs, part.labels, sparse, self.alpha, part.sampled)
            return loss if part.shares is None else part.shares[0] * loss
        return mix_part(
            self.alpha,
            lambda: _fused_label_loss(inputs, part.labels, sparse),
            lambda: fused_loss(inputs, part.labels, sparse, 0.0, part.sampled),
            part.shares,
        )

    def extra_repr(self) -> str:
        """The settings, as print(model) has them."""
        skew = f", skew={self.skew}" if self.divergence == "skewed" else ""
        own = f"alpha={self.alpha}, temperature={self.temperature}, divergence={self.divergence!r}{skew}"
        return f"{own}, task={self.task!r}"

    def _check_settings(self) -> None:
        row, wrong = TASKS[self.task], []
        if not 0 <= self.alpha <= 1:
            wrong.append(f"alpha: {self.alpha}, expected 0 to 1")
        if not self.temperature > 0:
            wrong.append(f"temperature: {self.temperature}, expected more than 0")
        elif not row.tempered and self.temperature != 1:
            wrong.append(f"temperature: {self.temperature}, expected 1: {self.task} has no temperature")
        if self.divergence not in row.divergences:
            wrong.append(f"divergence: {self.divergence!r}, expected {' or '.join(row.divergences)}")
        if not 0 < self.skew < 1:
            wrong.append(f"skew: {self.skew}, expected more than 0 and less than 1")
        if not row.has_label_loss and self.alpha != 0:
            wrong.append(f"alpha: {self.alpha}, expected 0: {self.task} has no labels")
        if wrong:
            raise ConfigError("DistillationLoss cannot be computed:\n  " + "\n  ".join(wrong))

    def _part(
        self,
        what: str,
        outputs: torch.Tensor,
        labels: torch.Tensor,
        targets: Mapping[str, Any],
        num_outputs: int | None = None,
    ) -> "_Part":
        """Outputs, labels and targets of the T targets, checked."""
        mask = targets.get("mask")
        leading = outputs.shape[:1] if mask is None else mask.shape
        if outputs.ndim != len(leading) + 1 or outputs.shape[:-1] != leading:
            expected = "[B, C]" if mask is None else f"{[*mask.shape]} and what belongs to each token"
            raise DataError(f"{what} have the shape {[*outputs.shape]}, expected {expected}.")
        num_outputs = outputs.shape[-1] if num_outputs is None else num_outputs
        expected_shape = [*leading, num_outputs] if labels.is_floating_point() else [*leading]
        if [*labels.shape] != expected_shape:
            raise DataError(
                f"labels ({labels.dtype}) have the shape {[*labels.shape]}, expected {expected_shape} for "
                f"{what} of the shape {[*outputs.shape]}."
            )
        if mask is not None:
            outputs, labels = outputs[mask], labels[mask]
        read = self._read_targets(targets, len(outputs), num_outputs)
        shares = tuple(targets["shares"].tolist()) if "shares" in targets else None
        sampled = isinstance(read, SparseTargets) and "log_tail" not in targets
        return _Part(outputs, inner_labels(labels), read, sampled, shares)

    def _read_targets(self, targets: Mapping[str, Any], num_targets: int, num_outputs: int) -> Targets:
        if "logits" not in targets and (missing := [key for key in ENTRIES if key not in targets]):
            raise DataError(
                f"targets have the keys {sorted(targets)}: no logits, and of entries {', '.join(missing)} "
                "is missing.\nPass the dict `targets` of a batch of CachedDataset as it is."
            )
        read = read_targets(targets, num_targets)
        if not isinstance(read, SparseTargets):
            found = read.logits.shape[1:] if isinstance(read, MixedTargets) else read.shape
            if [*found] != [num_targets, num_outputs]:
                raise DataError(
                    f"the teacher's logits have the shape {[*found]}, the student's "
                    f"{[num_targets, num_outputs]}: rows and classes must be the same."
                )
            return read
        if len(read.log_tail) != num_targets:
            raise DataError(f"found {len(read.log_tail)} targets for {num_targets} outputs of the student.")
        self._check_entries(read, "log_tail" not in targets, num_outputs)
        return read

    def _check_entries(self, entries: SparseTargets, sampled: bool, num_outputs: int) -> None:
        """Raise SpecMismatch where the soft loss cannot be had from entries, or they are of other ids."""
        faults, reasons = [], []
        if self.alpha < 1 and self.divergence != "forward":
            faults.append(Mismatch("divergence", "entries (forward)", self.divergence))
            reasons.append(ONLY_FORWARD.format(divergence=self.divergence))
        if self.alpha < 1 and sampled and self.temperature != 1:
            faults.append(Mismatch("temperature", "sampled entries (temperature 1)", self.temperature))
            reasons.append(UNTEMPERED)
        on_cpu = entries.ids.device.type == "cpu"
        if on_cpu or num_outputs != self._checked_outputs:  # a GPU waits for it: once
            largest = int(entries.ids.max()) if len(entries.ids) else -1
            if largest >= num_outputs:
                faults.append(Mismatch("largest id", largest, f"below {num_outputs}, the student's outputs"))
                reasons.append("The student has fewer outputs than the teacher: give it the same vocabulary.")
            self._checked_outputs = num_outputs
        if faults:
            raise SpecMismatch("the targets do not fit this loss", faults, " ".join(reasons))


class _Part(NamedTuple):
    """What a loss is computed of: T targets."""

    outputs: torch.Tensor  # T x C, or states T x D
    labels: torch.Tensor  # T, NO_LABEL for none; float32 [T, C], nan for none
    targets: Targets
    sampled: bool  # whether entries are random draws
    shares: tuple[float, float] | None  # of a rank's part of a batch


def _fused_label_loss(inputs: HeadInputs, labels_T: torch.Tensor, like: SparseTargets) -> torch.Tensor:
    """Cross-entropy in nats, mean over labelled tokens; 0, with a gradient of 0, where none is labelled."""
    labelled = labels_T != NO_LABEL
    states, head, bias = inputs.autocast()
    own = like._replace(log_tail=like.log_tail[labelled])
    loss = head_loss(states[labelled], head, mix_labels(labels_T[labelled], own, 1.0), bias)
    return loss / labelled.sum().clamp(min=1)
