"""Entries of params.yaml: `recipes`, a mix of losses and how long to train with it."""

from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from pipeline.config_match import Match
from pipeline.schedules import Share, Temperature, ends
from pipeline.section import Fraction, Positive, Section, distinct

# Fields that may be a list: their values are tried by cross-validation, and the best is taken.
CHOOSABLE = (
    "alpha", "temperature", "skew", "epochs", "batch_rows", "batch_tokens", "warmup", "weight_decay",
)  # fmt: skip


class Recipe(Section):
    """A mix of losses, alpha CE + (1 - alpha) T^2 KL, and how long to train with it.

    A number may be a list (alpha: [0, 0.5, 1]): `grid` then has all combinations, the recipe itself has the
    first, and a run chooses among them (choosing.py).
    """

    alpha: Share = 0.5
    """Weight of the labels' cross-entropy; rows without a label give the KL part alone. 1: labels only. A
    number, or a schedule over the steps: {schedule: linear, from: 0, to: 1}."""
    temperature: Temperature = 1.0
    """T of the KL part. The cache holds logits at T = 1. A number, a schedule, or one for each row:
    {by: confidence, low: 1, high: 4}."""
    divergence: Literal["forward", "reverse", "jsd", "skewed", "cosine", "mse"] = "forward"
    """Of student p from teacher t: KL(t || p), KL(p || t), Jensen-Shannon, or KL(t || skew t + (1 - skew) p).
    All but forward need a dense cache. Of several labels: forward, of each label's probability. Of numbers:
    mse. Of vectors: cosine, or mse."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the skewed divergence: the teacher's share of the mixture."""
    match: Match | None = None
    """Inner states of the teacher that the student is matched with: caches with hidden."""
    pool: bool | Literal["only"] = False
    """Train on the unlabelled pool too; only: on nothing else."""
    pseudo_labels: bool = False
    """Rows of the pool get the teacher's first choice as their label (Lee 2013): what the extra text gives
    without the teacher's probabilities. Needs alpha: 1 and pool: true."""
    views: Annotated[int, Field(ge=0)] = 0
    """Train on so many views of each training row too; the dataset is one of the shelf `augmented`."""
    view_labels: bool = False
    """Give views the label of their row. Without, they give the KL part alone: the teacher says what a text
    means after a word of it was exchanged or left out."""
    epochs: Positive = 5
    batch_rows: Positive = 64
    """Rows a step."""
    batch_tokens: Positive = 2048
    """Tokens a step, padding included, where there is a target a token; batch_rows then says nothing."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of a language model's training. auto: what a step is fastest in here, measured at the start."""
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    evaluations_per_epoch: Positive = 2
    patience: Positive = 4
    """Evaluations without improvement before it stops. The best state is kept."""

    folds: Annotated[int, Field(ge=2)] = 5
    """Where a number is a list: into how many parts the training rows are cut to choose from it."""
    _grid: tuple[dict[str, Any], ...] = PrivateAttr(())

    @property
    def grid(self) -> tuple[dict[str, Any], ...]:
        """What may be chosen, each the values of the fields that are lists; empty where none is."""
        return self._grid

    def chosen(self, values: dict[str, Any]) -> "Recipe":
        """The recipe with these values of its grid, and nothing left to choose."""
        taken = self.model_copy(update=values)
        taken._grid = ()
        return taken

    @property
    def labels_only(self) -> bool:
        """Whether no step of it looks at the teacher."""
        return min(ends(self.alpha)) == 1 and self.match is None and not self.pseudo_labels

    @property
    def predicts(self) -> bool:
        """Whether predictions count, and not inner states alone."""
        return self.match is None or max(ends(self.match.prediction)) > 0

    @property
    def family(self) -> str:
        """Which of the four that are compared it is: CE or KD, with or without extra text."""
        learns = "CE" if self.labels_only or self.pseudo_labels else "KD"
        return f"{learns} + extra text" if self.pool or self.views else learns

    @model_validator(mode="after")
    def _pool_needs_a_teacher(self) -> "Recipe":
        if self.pool and self.labels_only:
            raise ValueError(
                "alpha 1 trains on labels only, and the pool has none: set alpha below 1, or pool: false"
            )
        if self.pseudo_labels and not (self.pool and self.alpha == 1):
            raise ValueError("pseudo_labels trains on labels, the pool's too: set alpha: 1 and pool: true")
        if self.views and self.pool == "only":
            raise ValueError("pool: only trains on nothing else, and views are of training rows: remove one")
        if self.views and self.alpha == 1 and not self.view_labels:
            raise ValueError(
                "alpha 1 trains on labels only, and views have none: set alpha below 1, or view_labels: true"
            )
        if self.view_labels and not self.views:
            raise ValueError("view_labels is about views, and this recipe takes none: set views above 0")
        return self

    @model_validator(mode="wrap")  # the last of the validators, so that the others see each candidate
    @classmethod
    def _every_candidate(cls, value: Any, handler: ModelWrapValidatorHandler["Recipe"]) -> "Recipe":
        lists = {field: value[field] for field in CHOOSABLE if isinstance(value, dict) and field in value}
        lists = {field: values for field, values in lists.items() if isinstance(values, list)}
        if not lists:
            return handler(value)
        if value.get("views"):
            raise ValueError(
                f"{next(iter(lists))}: a fold would be judged by rows whose views it was trained on; "
                "choose the number with views: 0, then write it here"
            )
        for field, values in lists.items():
            if len(values) < 2:
                raise ValueError(f"{field}: a list of {len(values)} leaves no choice; write a number")
            distinct(tuple(map(str, values)))
        grid = []
        for numbers in reversed(list(product(*lists.values()))):  # the recipe is made as the first at last
            recipe = handler({**value, **dict(zip(lists, numbers, strict=True))})
            grid.append({field: getattr(recipe, field) for field in lists})
        recipe._grid = tuple(reversed(grid))
        return recipe
