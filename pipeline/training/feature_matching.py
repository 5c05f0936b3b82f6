"""A student beside its teacher's inner states: projections that are trained with it, and the loss.

The projections are no part of the student and are not saved with it.

Shape letters: B rows, L tokens, T true tokens or pooled rows, W the teacher's width, D the student's.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import nn

from pipeline.config.recipes import Match
from pipeline.config.schedules import Schedule, bounds, value_at
from pipeline.losses.features import relation_kl, score_mse, state_cosine, state_mse, unflatten_rows
from pipeline.objectives.base import Validate, Validation
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import inputs_of
from pipeline.students.architectures import StudentFeatures, TinyBERT
from pipeline.training.layer_maps import MatchPlan
from storage.spec import HiddenSpec

Pooling = Literal["first", "mean", "none"]
STATE_LOSSES = {"mse": state_mse, "cosine": state_cosine}


class MatchedOutput(NamedTuple):
    """What a student says to a batch, and how far its states are from its teacher's."""

    logits_BC: torch.Tensor
    loss: torch.Tensor  # all matched parts, each times its weight


class MatchedStudent(nn.Module):
    """`student` and a matrix to the teacher's width for its states, another for its embeddings.

    Called, it answers as the student does. `kept` says what the cache's states are.
    """

    def __init__(self, student: TinyBERT, match: Match, plan: MatchPlan, kept: HiddenSpec) -> None:
        super().__init__()
        self.student, self._match, self._plan, self._pool = student, match, plan, kept.pool
        own = student.bert.config.hidden_size
        self.projections = nn.ModuleDict()
        for part, settings in (("states", match.states), ("embeddings", match.embeddings)):
            if settings and settings.project:
                width = kept.kept_width(getattr(plan, part)[0].name)
                self.projections[part] = nn.Linear(own, width, bias=False)

    @property
    def reads(self) -> tuple[str, ...]:
        """The inputs that the student reads."""
        return inputs_of(self.student)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The student's logits [B, C]."""
        logits_BC: torch.Tensor = self.student(**inputs)
        return logits_BC

    def answer(self, batch: DistillBatch, done: float | None = None) -> MatchedOutput:
        """The student's logits, and the sum over parts of weight times the sum over its pairs of layers.

        Weights are those where this share of the training is done; None: each at its largest, so that looks
        at different steps can be compared.
        """
        match, plan, mask_BL = self._match, self._plan, batch.mask
        layers = {pair.layer for pair in (*plan.attention, *plan.relations)}
        seen = self.student.features(batch.inputs, sorted(layers))
        parts = []
        if match.states:
            loss = STATE_LOSSES[match.states.loss]
            found = [
                loss(self._state("states", seen, p.layer, mask_BL), batch.hidden[p.name]) for p in plan.states
            ]
            parts.append(_weight(match.states.weight, done) * torch.stack(found).sum())
        if match.embeddings:
            (pair,) = plan.embeddings
            own = self._state("embeddings", seen, pair.layer, mask_BL)
            apart = state_mse(own, batch.hidden[pair.name])
            parts.append(_weight(match.embeddings.weight, done) * apart)
        for settings, pairs, compare in (
            (match.attention, plan.attention, score_mse),
            (match.relations, plan.relations, relation_kl),
        ):
            if settings:
                found = [
                    compare(
                        seen.vectors[pair.layer], unflatten_rows(batch.hidden[pair.name], mask_BL), mask_BL,
                        settings.heads,
                    )
                    for pair in pairs
                ]  # fmt: skip
                parts.append(_weight(settings.weight, done) * torch.stack(found).sum())
        return MatchedOutput(seen.logits_BC, torch.stack(parts).sum())

    def _state(self, part: str, seen: StudentFeatures, layer: int, mask_BL: torch.Tensor) -> torch.Tensor:
        """The student's state as the cache has its teacher's, at its width: [T, W]."""
        state_TD = pool_states(seen.states[layer], mask_BL, self._pool)
        return self.projections[part](state_TD) if part in self.projections else state_TD


def _weight(value: float | Schedule, done: float | None) -> float:
    return max(bounds(value)) if done is None else value_at(value, done)


def pool_states(states_BLD: torch.Tensor, mask_BL: torch.Tensor, pool: Pooling) -> torch.Tensor:
    """One state a row [B, D]: its first token's, or the mean of its tokens'; none: one a token [T, D]."""
    if pool == "none":
        return states_BLD[mask_BL]
    if pool == "first":
        return states_BLD[:, 0]
    return (states_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)


@torch.inference_mode()
def validate_matching(
    model: MatchedStudent, batches: Iterable[DistillBatch], validate: Validate
) -> Validation:
    """The objective's score of the predictions, and the matching loss as the mean over rows."""
    device = next(model.parameters()).device
    loss = rows = 0.0
    student, teacher, labels = [], [], []
    for batch in batches:
        batch = batch.to(device)
        answer = model.answer(batch)
        loss += float(answer.loss) * batch.own_rows
        rows += batch.own_rows
        student.append(answer.logits_BC.cpu())
        labels.append(batch.labels_T.cpu())
        if isinstance(batch.teacher, torch.Tensor):
            teacher.append(batch.teacher.cpu())
    score = validate(torch.cat(student), torch.cat(labels), torch.cat(teacher) if teacher else None).score
    return Validation(score, loss / rows)
