"""How the results of each objective are shown: columns of the table, the metric that ranks, axes of plots."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]  # one file of results/eval: names, and metrics
Column = tuple[str, str, str, bool | None]  # metric, heading, kind, whether more is better (None: not marked)


class View(NamedTuple):
    """How the results of an objective are shown."""

    columns: tuple[Column, ...]
    metric: str  # ranks runs
    more: bool  # whether more of it is better
    axis: str  # the metric's name on a plot
    percent: bool  # whether the metric is a share
    finding: str  # of the headline: the metric's value, before what it was measured on
    score: str  # what Validation.score measures
    compared: tuple[str, float]  # the metric of gains over labels alone, and the factor to points or units
    by_loss: bool = False  # whether learning curves show the loss, not the score
    documents: bool = False  # whether rows are documents, with a target a token

    @property
    def of_teacher(self) -> bool:
        """Whether the table has the share of the teacher's metric that a student reaches."""
        return any(metric == "of_teacher" for metric, *_ in self.columns)

    @property
    def speed(self) -> str:
        """The metric of the second plot."""
        return "tokens_per_second" if self.documents else "latency_ms_batch_1"

    @property
    def speed_axis(self) -> str:
        """Its name on the plot."""
        if self.documents:
            return "tokens a second (reading, all cores)"
        return "milliseconds a row (batch 1, one thread)"

    @property
    def curve(self) -> str:
        """The column of a learning curve."""
        return "validation_loss" if self.by_loss else "validation_accuracy"

    @property
    def curve_axis(self) -> str:
        """Its name on the plot."""
        return f"validation {'loss' if self.by_loss else self.score}"

    @property
    def compared_heading(self) -> str:
        """The heading of the metric of `compared`."""
        return next(heading for metric, heading, *_ in self.columns if metric == self.compared[0])


SIZES: tuple[Column, ...] = (
    ("parameters", "parameters", "count", None),
    ("bytes", "MB on disk", "megabytes", False),
)
SECONDS: tuple[Column, ...] = (("train_seconds", "training (core-s)", "seconds", None),)
COSTS = (
    *SIZES,
    ("latency_ms_batch_1", "ms, batch 1", "milliseconds", False),
    ("latency_ms_batch_32", "ms, batch 32", "milliseconds", False),
    *SECONDS,
)

CLASSIFIERS = View(
    columns=(
        ("accuracy", "accuracy", "percent", True),
        ("over_labels", "points over labels alone", "points", True),
        ("of_teacher", "of the teacher's", "percent", True),
        ("roc_auc", "ROC AUC", "plain", True),
        ("macro_f1", "macro F1", "plain", True),
        ("agreement", "agreement", "percent", True),
        ("kl_to_teacher", "KL to teacher (nats)", "plain", False),
        ("ece", "ECE", "plain", False),
        *COSTS,
    ),
    metric="accuracy", more=True, axis="accuracy", percent=True, finding="is right on {:.1%} of",
    score="accuracy", compared=("accuracy", 100.0),
)  # fmt: skip
LABELS = View(
    columns=(
        ("macro_f1", "macro F1", "percent", True),
        ("over_labels", "points over labels alone", "points", True),
        ("micro_f1", "micro F1", "percent", True),
        ("roc_auc", "ROC AUC", "plain", True),
        ("exact_match", "all labels right", "percent", True),
        ("agreement", "agreement", "percent", True),
        ("kl_to_teacher", "KL to teacher (nats)", "plain", False),
        *COSTS,
    ),
    metric="macro_f1", more=True, axis="macro F1", percent=True, finding="has a macro F1 of {:.1%} on",
    score="macro F1", compared=("macro_f1", 100.0),
)  # fmt: skip
VALUES = View(
    columns=(
        ("rmse", "RMSE", "plain", False),
        ("over_labels", "RMSE below labels alone", "difference", True),
        ("mae", "mean absolute error", "plain", False),
        ("r2", "R²", "plain", True),
        ("pearson", "Pearson", "plain", True),
        ("spearman", "Spearman", "plain", True),
        ("rmse_to_teacher", "RMSE to teacher", "plain", False),
        *COSTS,
    ),
    metric="rmse", more=False, axis="RMSE", percent=False, finding="has an RMSE of {:.3f} on",
    score="R²", compared=("rmse", -1.0), by_loss=True,
)  # fmt: skip
VECTORS = View(
    columns=(
        ("cosine", "cosine to teacher", "plain", True),
        ("nearest", "same nearest row", "percent", True),
        ("nearest_10", "same of the nearest ten", "percent", True),
        *COSTS,
    ),
    metric="cosine", more=True, axis="cosine to teacher", percent=False,
    finding="has a mean cosine of {:.3f} to its teacher on", score="cosine", compared=("cosine", 1.0),
)  # fmt: skip
LANGUAGE_MODELS = View(
    columns=(
        ("perplexity", "perplexity", "perplexity", False),
        ("lm_loss", "loss (nats a token)", "plain", False),
        ("over_labels", "nats below labels alone", "difference", True),
        ("kl_to_teacher", "KL to teacher (nats)", "plain", False),
        ("agreement", "agreement", "percent", True),
        ("accuracy", "next token right", "percent", True),
        ("ece", "ECE", "plain", False),
        *SIZES,
        ("tokens_per_second", "tokens/s read", "seconds", True),
        ("train_tokens_per_second", "tokens/s trained", "seconds", None),
        *SECONDS,
    ),
    metric="perplexity", more=False, axis="perplexity", percent=False,
    finding="has a perplexity of {:,.1f} on", score="accuracy", compared=("lm_loss", -1.0), by_loss=True,
    documents=True,
)  # fmt: skip
# A view fits results that have its metric: language models have an accuracy too, classifiers a macro F1.
VIEWS = (LANGUAGE_MODELS, VALUES, VECTORS, CLASSIFIERS, LABELS)


def view_of(rows: Sequence[Row]) -> View:
    """The first of `VIEWS` that fits these rows, which are all of one task."""
    return next((view for view in VIEWS if view.metric in rows[0]["metrics"]), CLASSIFIERS)


def metric_mean(row: Row, metric: str) -> Any:
    """The mean over seeds; None where the row lacks the metric, or a seed does."""
    return row["metrics"].get(metric, {}).get("mean")


def best_row(rows: Sequence[Row], shown: View) -> Row:
    """The row that ranks first."""
    return (max if shown.more else min)(rows, key=lambda row: metric_mean(row, shown.metric))


def teacher_of(run: Row, teachers: Sequence[Row], shown: View = CLASSIFIERS) -> Row | None:
    """The row of the teacher that made the run's cache, where the teacher was scored."""
    metric = shown.compared[0]
    return next((t for t in teachers if t["teacher"] == run["teacher"] and metric_mean(t, metric)), None)
