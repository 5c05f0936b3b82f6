"""Sentence embeddings: distance to the teacher's vectors, neighbours.

Shape letters: N rows, B batch, W width of a vector.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from pipeline.objectives.base import Numbers, Validation, Values

NEIGHBOURS = 10
ROWS_AT_ONCE = 1024  # of similarities in memory


def no_quality(said_NW: Numbers, truth: object) -> Values:
    """Vectors have no labels to be right about."""
    return {}


def vector_agreement(said_NW: Numbers, teacher_NW: Numbers, truth: object) -> Values:
    """Mean cosine to the teacher's vectors; share of rows whose nearest other row (by cosine) is the same as
    for the teacher; mean share of its nearest ten (or of all others) that are the teacher's.
    """
    said, wanted = _unit(said_NW), _unit(teacher_NW)
    near, of_teacher = _nearest(said), _nearest(wanted)
    common = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(near, of_teacher, strict=True)]
    return {
        "cosine": float((said * wanted).sum(1).mean()),
        "nearest": float((near[:, 0] == of_teacher[:, 0]).mean()),
        "nearest_10": float(np.mean(common)),
    }


def _unit(vectors_NW: Numbers) -> Numbers:
    lengths = np.linalg.norm(vectors_NW, axis=1, keepdims=True)
    made: Numbers = vectors_NW / np.maximum(lengths, 1e-12)
    return made


def _nearest(unit_NW: Numbers) -> npt.NDArray[np.int64]:
    """The nearest other rows of each row, nearest first (ties: the earlier row): [N, 10], or all others."""
    found = []
    for start in range(0, len(unit_NW), ROWS_AT_ONCE):
        part = unit_NW[start : start + ROWS_AT_ONCE]
        similar = part @ unit_NW.T
        similar[np.arange(len(part)), np.arange(start, start + len(part))] = -np.inf  # not itself
        found.append(np.argsort(-similar, axis=1, kind="stable")[:, : min(NEIGHBOURS, len(unit_NW) - 1)])
    return np.concatenate(found)


def no_label_loss(said_BC: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """0: there is nothing to learn from but the teacher."""
    return 0 * said_BC.sum()


def vector_distance(
    said_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0, divergence: str = "cosine"
) -> torch.Tensor:
    """cosine: 1 - cos(student, teacher), mean over rows. mse: squared error (Reimers and Gurevych 2020)."""
    if divergence == "mse":
        return mse_loss(said_BC, teacher_BC)
    return (1 - cosine_similarity(said_BC, teacher_BC, dim=-1)).mean()


def validate_vectors(said: torch.Tensor, truth: torch.Tensor, teacher: torch.Tensor | None) -> Validation:
    """Validation by the cosine to the teacher's vectors."""
    assert teacher is not None  # students alone look at vectors
    lost = vector_distance(said, teacher).item()
    return Validation(1 - lost, lost)
