"""How the results of each task are shown: columns, the metric that ranks, axes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]  # one file of results/eval: what it is about, and its metrics
Column = tuple[str, str, str, bool | None]  # metric, heading, kind, whether more is better (None: not marked)


class View(NamedTuple):
    """How results of a task are shown."""

    columns: tuple[Column, ...]
    metric: str  # what runs are ranked by
    more: bool  # whether more of it is better
    axis: str  # its name beside a plot
    percent: bool
    speed: str  # the metric of the second plot
    speed_axis: str
    curve: str  # of a learning curve's points
    curve_axis: str
    finding: str = "is right on {:.1%} of"  # what the metric says of a run, before what it was measured on
    documents: bool = False  # whether rows are documents, with a target a token
    compared: tuple[str, float] = ("accuracy", 100.0)  # over_labels: of this metric, times this

    @property
    def compared_heading(self) -> str:
        """What people call the metric of `compared`."""
        return next(heading for metric, heading, *_ in self.columns if metric == self.compared[0])


CLASSIFIERS = View(
    (
        ("accuracy", "accuracy", "percent", True),
        ("over_labels", "points over labels alone", "points", True),
        ("of_teacher", "of the teacher's", "percent", True),
        ("roc_auc", "ROC AUC", "plain", True),
        ("macro_f1", "macro F1", "plain", True),
        ("agreement", "agreement", "percent", True),
        ("kl_to_teacher", "KL to teacher (nats)", "plain", False),
        ("ece", "ECE", "plain", False),
        ("parameters", "parameters", "count", None),
        ("bytes", "MB on disk", "megabytes", False),
        ("latency_ms_batch_1", "ms, batch 1", "milliseconds", False),
        ("latency_ms_batch_32", "ms, batch 32", "milliseconds", False),
        ("train_seconds", "training (core-s)", "seconds", None),
    ),
    "accuracy", True, "accuracy", True, "latency_ms_batch_1", "milliseconds a row (batch 1, one thread)",
    "validation_accuracy", "validation accuracy",
)  # fmt: skip
_COSTS = CLASSIFIERS.columns[-5:]
_SPEED = CLASSIFIERS[5:7]
LABELS = View(
    (
        ("macro_f1", "macro F1", "percent", True),
        ("over_labels", "points over labels alone", "points", True),
        ("micro_f1", "micro F1", "percent", True),
        ("roc_auc", "ROC AUC", "plain", True),
        ("exact_match", "all labels right", "percent", True),
        ("agreement", "agreement", "percent", True),
        ("kl_to_teacher", "KL to teacher (nats)", "plain", False),
        *_COSTS,
    ),
    "macro_f1", True, "macro F1", True, *_SPEED, "validation_accuracy", "validation macro F1",
    "has a macro F1 of {:.1%} on", compared=("macro_f1", 100.0),
)  # fmt: skip
VALUES = View(
    (
        ("rmse", "RMSE", "plain", False),
        ("over_labels", "RMSE below labels alone", "nats", True),
        ("mae", "mean absolute error", "plain", False),
        ("r2", "R²", "plain", True),
        ("pearson", "Pearson", "plain", True),
        ("spearman", "Spearman", "plain", True),
        ("rmse_to_teacher", "RMSE to teacher", "plain", False),
        *_COSTS,
    ),
    "rmse", False, "RMSE", False, *_SPEED, "validation_loss", "validation loss",
    "has an RMSE of {:.3f} on", compared=("rmse", -1.0),
)  # fmt: skip
VECTORS = View(
    (
        ("cosine", "cosine to teacher", "plain", True),
        ("nearest", "same nearest row", "percent", True),
        ("nearest_10", "same of the nearest ten", "percent", True),
        *_COSTS,
    ),
    "cosine", True, "cosine to teacher", False, *_SPEED, "validation_accuracy", "validation cosine",
    "has a mean cosine of {:.3f} to its teacher on", compared=("cosine", 1.0),
)  # fmt: skip
LANGUAGE_MODELS = View(
    (
        ("perplexity", "perplexity", "perplexity", False),
        ("lm_loss", "loss (nats a token)", "plain", False),
        ("over_labels", "nats below labels alone", "nats", True),
        ("kl_to_teacher", "KL to teacher (nats)", "plain", False),
        ("agreement", "agreement", "percent", True),
        ("accuracy", "next token right", "percent", True),
        ("ece", "ECE", "plain", False),
        ("parameters", "parameters", "count", None),
        ("bytes", "MB on disk", "megabytes", False),
        ("tokens_per_second", "tokens/s read", "seconds", True),
        ("train_tokens_per_second", "tokens/s trained", "seconds", None),
        ("train_seconds", "training (core-s)", "seconds", None),
    ),
    "perplexity", False, "perplexity", False, "tokens_per_second", "tokens a second (reading, all cores)",
    "validation_loss", "validation loss",
    "has a perplexity of {:,.1f} on", documents=True, compared=("lm_loss", -1.0),
)  # fmt: skip
# A view fits results that have its metric. Language models have an accuracy too, and classifiers a macro F1.
VIEWS = (LANGUAGE_MODELS, VALUES, VECTORS, CLASSIFIERS, LABELS)


def view_of(rows: Sequence[Row]) -> View:
    """The first of `VIEWS` whose metric these rows have; all are of one task."""
    return next((view for view in VIEWS if view.metric in rows[0]["metrics"]), CLASSIFIERS)


def metric_mean(row: Row, metric: str) -> Any:
    """The mean over seeds, None where it could not be had."""
    return row["metrics"].get(metric, {}).get("mean")


def best_row(rows: Sequence[Row], shown: View) -> Row:
    """The row that is ranked first."""
    return (max if shown.more else min)(rows, key=lambda row: metric_mean(row, shown.metric))


def teacher_of(run: Row, teachers: Sequence[Row], shown: View = CLASSIFIERS) -> Row | None:
    """The row of the teacher that made the run's cache, where it was scored."""
    metric = shown.compared[0]
    return next((t for t in teachers if t["teacher"] == run["teacher"] and metric_mean(t, metric)), None)
