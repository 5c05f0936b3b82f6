"""Entries of params.yaml: `recipes`, a mix of losses, with `match` for the inner states of the teacher."""

from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from pipeline.config.base import Fraction, Positive, Section, distinct
from pipeline.config.schedules import ShareOrSchedule, Temperature, WeightOrNone, WeightOrSchedule, bounds
from pipeline.config.tasks import ClassDivergence

Layer = Annotated[int, Field(ge=0)]
LayerPair = Annotated[tuple[Layer, Layer], Field(strict=False)]
LayerMap = (
    Literal["uniform", "top", "bottom"] | Annotated[tuple[LayerPair, ...], Field(min_length=1, strict=False)]
)


class MatchedStates(Section):
    """Outputs of layers. Per position or pooled, as the cache keeps them: the student's are pooled alike."""

    weight: WeightOrSchedule = 1.0
    map: LayerMap = "uniform"
    """Which layer of the teacher each layer of the student is matched with. With n layers of the student and
    N the deepest that the cache keeps: uniform: i with i N / n, rounded up; top: with N - n + i; bottom: with
    i. Or a list of [teacher's, student's]; 0 is the embeddings."""
    loss: Literal["mse", "cosine"] = "mse"
    """mse: mean squared difference a dimension. cosine: 1 - cos."""
    project: bool = True
    """Through a learned matrix, one for all layers, to the teacher's width. false: as they are; widths must
    be equal."""


class MatchedEmbeddings(Section):
    """Outputs of the embeddings (layer 0), by their mean squared difference."""

    weight: WeightOrSchedule = 1.0
    project: bool = True
    """Through a learned matrix of their own. false: as they are; widths must be equal."""


class MatchedAttention(Section):
    """Attention scores before the softmax, of caches with qkv."""

    heads: Positive
    """Attention heads of the teacher: the cache has its vectors before they are cut into heads. The student
    must have as many."""
    weight: WeightOrSchedule = 1.0
    map: LayerMap = "uniform"
    """As for states, over the layers whose qkv the cache keeps."""


class MatchedRelations(Section):
    """Relations of queries, of keys and of values, of caches with qkv. Widths and heads may differ."""

    heads: Positive
    """Relation heads: they divide the widths of teacher and student. More than attention heads are well."""
    teacher_layer: Positive
    weight: WeightOrSchedule = 1.0
    student_layer: Literal["last"] | Positive = "last"


class Match(Section):
    """Inner states that a student is matched with, and what its predictions count beside them."""

    prediction: WeightOrNone = 1.0
    """Weight of the recipe's other losses (alpha CE + (1 - alpha) soft). 0: states alone; the best student is
    then that of the lowest matching loss on validation. This weight and the others are numbers, or schedules
    over the steps, as alpha is."""
    states: MatchedStates | None = None
    embeddings: MatchedEmbeddings | None = None
    attention: MatchedAttention | None = None
    relations: MatchedRelations | None = None

    @model_validator(mode="after")
    def _something(self) -> "Match":
        if not any((self.states, self.embeddings, self.attention, self.relations)):
            raise ValueError("nothing to match: name states, embeddings, attention or relations")
        return self


# Fields that may be a list: their values are tried by cross-validation, and the best is taken.
CHOOSABLE = (
    "alpha", "temperature", "skew", "epochs", "batch_rows", "batch_tokens", "warmup", "weight_decay",
)  # fmt: skip


class Recipe(Section):
    """A mix of losses, alpha CE + (1 - alpha) T^2 KL, and how long to train with it.

    A number may be a list (alpha: [0, 0.5, 1]): `grid` then has all combinations, the recipe itself has the
    first, and a run chooses among them (choosing.py).
    """

    alpha: ShareOrSchedule = 0.5
    """Weight of the labels' cross-entropy; rows without a label give the KL part alone. 1: labels only. A
    number, or a schedule over the steps: {schedule: linear, from: 0, to: 1}."""
    temperature: Temperature = 1.0
    """T of the KL part. The cache holds logits at T = 1. A number, a schedule, or one for each row:
    {by: confidence, low: 1, high: 4}."""
    divergence: Literal[ClassDivergence, "cosine", "mse"] = "forward"
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
        return min(bounds(self.alpha)) == 1 and self.match is None and not self.pseudo_labels

    @property
    def predicts(self) -> bool:
        """Whether predictions count, and not inner states alone."""
        return self.match is None or max(bounds(self.match.prediction)) > 0

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
