"""Cross-validation of a recipe's numbers on one cache: folds, candidates, and the best one.

The training rows are cut into folds by a hash of their row_id. Each candidate is trained once a fold on all
other folds, with the run's first seed, and judged on the fold that it has not seen. Pool rows are trained on
every time and judged on never; the validation and test splits are not used. In every other respect it is the
training of a run: the fold takes the place of validation.
"""

import hashlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.config.recipes import Recipe
from pipeline.data.rows import POOL, Rows
from pipeline.training.selection import rank
from storage.errors import DataError

CandidateValues = dict[str, Any]  # of the fields of a recipe that are lists


class FoldScores(NamedTuple):
    """The scores of a candidate on each fold, in their order."""

    score: list[float]  # Validation.score
    loss: list[float]


class Trial(NamedTuple):
    """One training that judges a candidate."""

    values: CandidateValues
    fold: int  # that it does not see
    folds: int

    def __str__(self) -> str:
        """Its name in messages."""
        return f"{describe_values(self.values)}, fold {self.fold + 1} of {self.folds}"


def describe_values(values: CandidateValues) -> str:
    """The numbers of a candidate, as text."""
    return ", ".join(f"{field} {value}" for field, value in values.items())


def fold_of(row_id: str, folds: int) -> int:
    """The fold of a training row: a function of its id alone, so that new rows move no other."""
    return int.from_bytes(hashlib.sha256(f"fold/{row_id}".encode()).digest()[:8], "little") % folds


def hold_out_fold(rows: Rows, fold: int, folds: int) -> Rows:
    """The training and pool rows, those of this fold as the validation split.

    Raises DataError where the fold or the rest would be empty.
    """
    rows = rows.only("train", POOL)
    training = rows.splits == "train"
    own = np.array([fold_of(row_id, folds) == fold for row_id in rows.row_ids.to_pylist()]) & training
    num_own, num_training = own.sum(), training.sum()
    if num_own in (0, num_training):
        raise DataError(
            f"fold {fold + 1} of {folds} has {num_own} of {num_training} training rows: nothing to judge.\n"
            "Set folds lower, or choose the number by hand."
        )
    return rows._replace(splits=np.where(own, "validation", rows.splits))


def all_trials(recipe: Recipe) -> list[Trial]:
    """All trainings: the folds of the first candidate, then those of the next."""
    return [Trial(values, fold, recipe.folds) for values in recipe.grid for fold in range(recipe.folds)]


def best_candidate(scores: Sequence[FoldScores], by_loss: bool) -> int:
    """The place of the best means over the folds (training/selection.py); of equal candidates the first."""

    def mean_rank(place: int) -> tuple[float, float]:
        return rank(statistics.fmean(scores[place].score), statistics.fmean(scores[place].loss), by_loss)

    return max(range(len(scores)), key=mean_rank)
