"""A student that is matched with its teacher's hidden states: projections that train with it, and the loss.

The projections are no part of the student and are not saved with it.

Shape letters: B rows, L tokens, T true tokens or pooled rows, W the teacher's width, D the student's.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from pipeline.config.match import Match, MatchedPart
from pipeline.config.schedules import Schedule, bounds, value_at
from pipeline.losses.features import FEATURE_LOSSES, FeaturePair, pool_states, unflatten_rows
from pipeline.objectives.base import Validate, Validation
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import inputs_of
from pipeline.students.base import StudentFeatures, StudentModel
from pipeline.training.layer_maps import MatchedPair, MatchPlan
from storage.spec import HiddenSpec


class MatchedOutput(NamedTuple):
    """What a student returns for a batch, and how far its states are from its teacher's."""

    logits_BC: torch.Tensor
    loss: torch.Tensor  # of all matched parts, each times its weight


class MatchedStudent(nn.Module):
    """`student` and, for each part of `match` that is projected, a matrix to the teacher's width.

    Called, it returns the student's logits. `kept` describes the states of the cache.
    """

    def __init__(self, student: StudentModel, match: Match, plan: MatchPlan, kept: HiddenSpec) -> None:
        super().__init__()
        self.student, self._match, self._plan, self._pool = student, match, plan, kept.pool
        self.projections = nn.ModuleDict()
        for name, part in match.parts.items():
            if part.projects:
                width = kept.kept_width(plan.pairs[name][0].name)
                self.projections[name] = nn.Linear(plan.width, width, bias=False)

    @property
    def reads(self) -> tuple[str, ...]:
        """The inputs that the student reads."""
        return inputs_of(self.student)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The student's logits [B, C]."""
        logits_BC: torch.Tensor = self.student(**inputs)
        return logits_BC

    def match(self, batch: DistillBatch, done: float | None = None) -> MatchedOutput:
        """The student's logits, and the sum over parts of weight times the sum over its pairs of layers.

        Weights are those where this share of the training is done; None: each at its largest, so that
        validations at different steps can be compared.
        """
        parts = self._match.parts
        qkv = {
            pair.layer for name, part in parts.items() if part.reads == "qkv" for pair in self._pairs(name)
        }
        features = self.student.features(batch.inputs, sorted(qkv))
        losses = []
        for name, part in parts.items():
            compare = FEATURE_LOSSES[name]
            found = [compare(self._features(name, p, features, batch), part) for p in self._pairs(name)]
            losses.append(_weight(part, done) * torch.stack(found).sum())
        return MatchedOutput(features.logits_BC, torch.stack(losses).sum())

    def _pairs(self, name: str) -> tuple[MatchedPair, ...]:
        return self._plan.pairs[name]

    def _features(
        self, name: str, pair: MatchedPair, features: StudentFeatures, batch: DistillBatch
    ) -> FeaturePair:
        """The student's vectors of one pair of layers, as the cache has its teacher's, and these."""
        cached = batch.hidden[pair.name]
        if self._match.parts[name].reads == "qkv":
            return FeaturePair(features.qkv[pair.layer], unflatten_rows(cached, batch.mask), batch.mask)
        state_TD = pool_states(features.states[pair.layer], batch.mask, self._pool)
        own = self.projections[name](state_TD) if name in self.projections else state_TD
        return FeaturePair(own, cached, batch.mask)


def _weight(part: MatchedPart, done: float | None) -> float:
    value: float | Schedule = part.weight
    return max(bounds(value)) if done is None else value_at(value, done)


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
        output = model.match(batch)
        loss += float(output.loss) * batch.own_rows
        rows += batch.own_rows
        student.append(output.logits_BC.cpu())
        labels.append(batch.labels_T.cpu())
        if isinstance(batch.teacher, torch.Tensor):
            teacher.append(batch.teacher.cpu())
    score = validate(torch.cat(student), torch.cat(labels), torch.cat(teacher) if teacher else None).score
    return Validation(score, loss / rows)
