"""Which state of a training, seed of a run or candidate of a choice is the best: one rule for all three."""

from typing import Any


def rank(score: float, loss: float, by_loss: bool) -> tuple[float, float]:
    """What to compare them by, larger is better: the score (ties: the lower loss), or the loss (ties: the
    higher score). Both are of validation, or of a fold that was held out.
    """
    return (-loss, score) if by_loss else (score, -loss)


def judged_by(by_loss: bool) -> str:
    """How training.json names the rule. The score is called accuracy there, whatever the objective."""
    return "loss" if by_loss else "accuracy"


def best_seed(record: dict[str, Any]) -> int:
    """The best seed of a run, by the rule that chose the best state of each. `record`: see job.run_record."""
    by_loss = record.get("judged_by") == "loss"  # records without the key are of runs judged by accuracy
    best = max(record["seeds"], key=lambda seed: rank(seed["best_accuracy"], seed["best_loss"], by_loss))
    seed: int = best["seed"]
    return seed
