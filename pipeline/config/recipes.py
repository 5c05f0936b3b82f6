"""Entries of params.yaml: `recipes`, a mix of losses, and how long to train with it."""

from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from pipeline.config.base import Fraction, Positive, Section, distinct
from pipeline.config.match import Match
from pipeline.config.schedules import ShareOrSchedule, Temperature, bounds
from pipeline.config.tasks import ClassDivergence

# Why entries of sparse targets have one divergence, and sampled ones one temperature.
ONLY_FORWARD = (
    "{divergence} weighs ids by the student's own probability; on truncated targets it is ruled by ids that "
    "the cache does not hold."
)
UNTEMPERED = (
    "A sampled weight is unbiased for the probability, not for a power of it: at another temperature the "
    "loss would be biased."
)

# Fields that may be a list of candidates: cross-validation chooses one.
CHOOSABLE = (
    "alpha", "temperature", "skew", "epochs", "batch_rows", "batch_tokens", "warmup", "weight_decay",
)  # fmt: skip


class Recipe(Section):
    """A mix of losses, alpha CE + (1 - alpha) T^2 KL, and the length of the training.

    A number may be a list (alpha: [0, 0.5, 1]): `grid` then has all combinations, the recipe itself has the
    first, and a run chooses one (training/cross_validation.py).
    """

    alpha: ShareOrSchedule = 0.5
    """Weight of the labels' cross-entropy; rows without a label have the KL part alone. 1: labels only. A
    number, or a schedule over the steps: {schedule: linear, from: 0, to: 1}."""
    temperature: Temperature = 1.0
    """T of the KL part; the cache has logits at T = 1. A number, a schedule, or one for each row:
    {by: confidence, low: 1, high: 4}."""
    divergence: Literal[ClassDivergence, "cosine", "mse"] = "forward"
    """Of student p from teacher t: KL(t || p), KL(p || t), Jensen-Shannon, or KL(t || skew t + (1 - skew) p).
    All except forward need a dense cache. Several labels: forward, of each label's probability. Numbers: mse.
    Vectors: cosine or mse."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the skewed divergence: the teacher's share of the mixture."""
    match: Match | None = None
    """Hidden states of the teacher that the student is matched with; the cache needs `hidden`."""
    pool: bool | Literal["only"] = False
    """Whether to train on the unlabelled pool too; only: on the pool alone."""
    pseudo_labels: bool = False
    """Whether rows of the pool have the teacher's first choice as label (Lee 2013): the effect of the extra
    text without the teacher's probabilities. Needs alpha: 1 and pool: true."""
    views: Annotated[int, Field(ge=0)] = 0
    """Views of each training row to train on too; the dataset is an entry of `augmented`."""
    view_labels: bool = False
    """Whether views have the label of their row. false: they have the KL part alone, because a text may have
    another meaning after a word was replaced or deleted."""
    epochs: Positive = 5
    batch_rows: Positive = 64
    """Rows a step."""
    batch_tokens: Positive = 2048
    """Tokens a step, padding included, of language models; batch_rows is not used there."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of a language model's training. auto: the faster one, measured at the start."""
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    evaluations_per_epoch: Positive = 2
    patience: Positive = 4
    """Evaluations without improvement before it stops. The best state is kept."""

    folds: Annotated[int, Field(ge=2)] = 5
    """Where a number is a list: the number of folds of the training rows in cross-validation."""
    _grid: tuple[dict[str, Any], ...] = PrivateAttr(())

    @property
    def grid(self) -> tuple[dict[str, Any], ...]:
        """The candidates, each with a value for every field that is a list; empty without lists."""
        return self._grid

    def chosen(self, values: dict[str, Any]) -> "Recipe":
        """The recipe with these values of its grid, and no grid."""
        recipe = self.model_copy(update=values)
        recipe._grid = ()
        return recipe

    @property
    def labels_only(self) -> bool:
        """Whether no step reads a target of the teacher."""
        return min(bounds(self.alpha)) == 1 and self.match is None and not self.pseudo_labels

    @property
    def predicts(self) -> bool:
        """Whether predictions have a loss, and not hidden states alone."""
        return self.match is None or max(bounds(self.match.prediction)) > 0

    @property
    def family(self) -> str:
        """CE or KD, with or without extra text: the report compares these four."""
        learns = "CE" if self.labels_only or self.pseudo_labels else "KD"
        return f"{learns} + extra text" if self.pool or self.views else learns

    @model_validator(mode="after")
    def _pool_needs_a_teacher(self) -> "Recipe":
        if self.pool and self.labels_only:
            raise ValueError(
                "alpha 1 trains on labels only, and the pool has none: set alpha below 1, or pool: false"
            )
        if self.pseudo_labels and not (self.pool and self.alpha == 1):
            raise ValueError("pseudo_labels are labels of the pool: set alpha: 1 and pool: true")
        if self.views and self.pool == "only":
            raise ValueError("pool: only trains on the pool alone, views are of training rows: remove one")
        if self.views and self.alpha == 1 and not self.view_labels:
            raise ValueError(
                "alpha 1 trains on labels only, and views have none: set alpha below 1, or view_labels: true"
            )
        if self.view_labels and not self.views:
            raise ValueError("view_labels needs views: set views above 0, or remove it")
        return self

    @model_validator(mode="wrap")  # the last validator, so that the others check every candidate
    @classmethod
    def _every_candidate(cls, value: Any, handler: ModelWrapValidatorHandler["Recipe"]) -> "Recipe":
        lists = {field: value[field] for field in CHOOSABLE if isinstance(value, dict) and field in value}
        lists = {field: values for field, values in lists.items() if isinstance(values, list)}
        if not lists:
            return handler(value)
        if value.get("views"):
            raise ValueError(
                f"{next(iter(lists))}: a fold would be evaluated on rows whose views were trained on; "
                "choose the number with views: 0, then write it here"
            )
        for field, values in lists.items():
            if len(values) < 2:
                raise ValueError(f"{field}: a list of {len(values)} leaves no choice; write a number")
            distinct(tuple(map(str, values)))
        grid = []
        for numbers in reversed(list(product(*lists.values()))):  # the last one made is the recipe itself
            recipe = handler({**value, **dict(zip(lists, numbers, strict=True))})
            grid.append({field: getattr(recipe, field) for field in lists})
        recipe._grid = tuple(reversed(grid))
        return recipe
