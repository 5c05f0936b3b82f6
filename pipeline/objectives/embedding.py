"""Sentence embeddings: distance to the teacher's vectors, neighbours. Rows have no labels.

Shape letters: N rows, B batch, W width of a vector.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from pipeline.objectives.base import LabelLoss, Numbers, Objective, SoftLossSettings, Validation, Values

NEIGHBOURS = 10
ROWS_AT_ONCE = 1024  # of similarities in memory


def label_loss(student_BW: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Zero: rows have no labels."""
    return 0 * student_BW.sum()


def cosine_distance(student_BW: torch.Tensor, teacher_BW: torch.Tensor) -> torch.Tensor:
    """1 - cos(student, teacher), mean over rows."""
    return (1 - cosine_similarity(student_BW, teacher_BW, dim=-1)).mean()


# By name; mse: Reimers and Gurevych 2020.
DISTANCES: dict[str, LabelLoss] = {"cosine": cosine_distance, "mse": mse_loss}


def soft_loss(student_BW: torch.Tensor, teacher_BW: torch.Tensor, settings: SoftLossSettings) -> torch.Tensor:
    """The distance that the settings name as divergence, mean over rows."""
    return DISTANCES[settings.divergence](student_BW, teacher_BW)


def validate(student_NW: torch.Tensor, labels: torch.Tensor, teacher_NW: torch.Tensor | None) -> Validation:
    """Score: the mean cosine to the teacher's vectors."""
    assert teacher_NW is not None  # only students are trained on vectors
    distance = cosine_distance(student_NW, teacher_NW).item()
    return Validation(1 - distance, distance)


def no_quality(student_NW: Numbers, labels: object) -> Values:
    """No metrics: vectors have no labels."""
    return {}


def vector_agreement(student_NW: Numbers, teacher_NW: Numbers, labels: object) -> Values:
    """Mean cosine to the teacher's vectors; share of rows whose nearest other row (by cosine) is the same as
    for the teacher; mean share of its nearest ten (or of all others) that are the teacher's.
    """
    student, teacher = _unit(student_NW), _unit(teacher_NW)
    near, near_teacher = _nearest(student), _nearest(teacher)
    common = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(near, near_teacher, strict=True)]
    return {
        "cosine": float((student * teacher).sum(1).mean()),
        "nearest": float((near[:, 0] == near_teacher[:, 0]).mean()),
        "nearest_10": float(np.mean(common)),
    }


def _unit(vectors_NW: Numbers) -> Numbers:
    lengths = np.linalg.norm(vectors_NW, axis=1, keepdims=True)
    unit_NW: Numbers = vectors_NW / np.maximum(lengths, 1e-12)
    return unit_NW


def _nearest(unit_NW: Numbers) -> npt.NDArray[np.int64]:
    """The nearest other rows of each row, nearest first (ties: the earlier row): [N, 10], or all others."""
    found = []
    for start in range(0, len(unit_NW), ROWS_AT_ONCE):
        part = unit_NW[start : start + ROWS_AT_ONCE]
        similar = part @ unit_NW.T
        similar[np.arange(len(part)), np.arange(start, start + len(part))] = -np.inf  # not itself
        found.append(np.argsort(-similar, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(unit_NW) - 1)])
    return np.concatenate(found)


EMBEDDING = Objective(label_loss, soft_loss, DISTANCES.keys(), validate, True, no_quality, vector_agreement)
