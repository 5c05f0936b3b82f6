"""Section `match` of a recipe: the hidden states of the teacher that a student is matched with.

Each part is a section with class facts; its loss is an entry of losses.features.FEATURE_LOSSES. A new part is
one more of each, and a field of `Match`.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from pipeline.config.base import Positive, Section
from pipeline.config.schedules import WeightOrNone, WeightOrSchedule

Layer = Annotated[int, Field(ge=0)]
LayerPair = Annotated[tuple[Layer, Layer], Field(strict=False)]
LayerMap = (
    Literal["uniform", "top", "bottom"] | Annotated[tuple[LayerPair, ...], Field(min_length=1, strict=False)]
)


def _mapped(chosen: LayerMap, deepest: int, num_layers: int) -> tuple[LayerPair, ...]:
    """The pairs of layers that a map means. Without a deepest layer, as if there were `num_layers`: a cache
    that keeps no layer is refused for what it lacks.
    """
    deepest = deepest or num_layers
    if not isinstance(chosen, str):
        return chosen
    if chosen == "uniform":
        return tuple((-(-own * deepest // num_layers), own) for own in range(1, num_layers + 1))
    first = deepest - num_layers if chosen == "top" else 0
    return tuple((first + own, own) for own in range(1, num_layers + 1))


class MatchedPart(Section):
    """One part of `match`: which vectors of the teacher it compares with which of the student's.

    Its loss is the entry of this name in losses.features.FEATURE_LOSSES.
    """

    reads: ClassVar[Literal["layer", "qkv"]]
    """What a cache must keep. layer: outputs of layers, 0 is the embeddings. qkv: queries, keys and values of
    attention, before they are cut into heads."""
    students_heads: ClassVar[bool] = False
    """Whether `heads` are the student's own attention heads."""
    if TYPE_CHECKING:  # a field of each section, at its own place in their order
        weight: WeightOrSchedule

    def layer_pairs(self, deepest: int, num_layers: int) -> tuple[LayerPair, ...]:
        """(teacher's layer, student's layer) of what is compared. `deepest`: the last layer that the cache
        keeps of what it reads; `num_layers`: the student's.
        """
        raise NotImplementedError

    @property
    def projects(self) -> bool:
        """Whether the student's vectors go through a learned matrix to the teacher's width."""
        return False

    @property
    def needs_equal_widths(self) -> bool:
        """Whether the student must be as wide as its teacher."""
        return False

    @property
    def needs_the_mean(self) -> bool:
        """Whether the vectors' mean counts, which principal components leave out."""
        return False

    @property
    def num_heads(self) -> int | None:
        """The heads that vectors are cut into; they divide both widths. None: they are not cut."""
        return None


class MatchedStates(MatchedPart):
    """Outputs of layers, of each position or pooled as in the cache: the student's are pooled alike."""

    reads = "layer"

    weight: WeightOrSchedule = 1.0
    map: LayerMap = "uniform"
    """The teacher's layer for each layer of the student. With layer i of n, and N the deepest in the cache:
    uniform: i N / n, rounded up; top: N - n + i; bottom: i. Or a list of [teacher's, student's]; 0 is the
    embeddings."""
    loss: Literal["mse", "cosine"] = "mse"
    """mse: mean squared difference a dimension. cosine: 1 - cos."""
    project: bool = True
    """Whether a learned matrix, one for all layers, maps states to the teacher's width. false: widths must be
    equal."""

    def layer_pairs(self, deepest: int, num_layers: int) -> tuple[LayerPair, ...]:
        """See MatchedPart."""
        return _mapped(self.map, deepest, num_layers)

    @property
    def projects(self) -> bool:
        """See MatchedPart."""
        return self.project

    @property
    def needs_equal_widths(self) -> bool:
        """See MatchedPart."""
        return not self.project

    @property
    def needs_the_mean(self) -> bool:
        """See MatchedPart."""
        return self.loss == "cosine"


class MatchedEmbeddings(MatchedPart):
    """Outputs of the embeddings (layer 0), by their mean squared difference."""

    reads = "layer"

    weight: WeightOrSchedule = 1.0
    project: bool = True
    """Whether a learned matrix maps them to the teacher's width. false: widths must be equal."""

    def layer_pairs(self, deepest: int, num_layers: int) -> tuple[LayerPair, ...]:
        """See MatchedPart."""
        return ((0, 0),)

    @property
    def projects(self) -> bool:
        """See MatchedPart."""
        return self.project

    @property
    def needs_equal_widths(self) -> bool:
        """See MatchedPart."""
        return not self.project


class MatchedAttention(MatchedPart):
    """Attention scores before the softmax, of caches with qkv."""

    reads = "qkv"
    students_heads = True

    heads: Positive
    """Attention heads of the teacher: the cache keeps vectors before they are split into heads. The student
    must have as many."""
    weight: WeightOrSchedule = 1.0
    map: LayerMap = "uniform"
    """As for states, over the layers whose qkv is in the cache."""

    def layer_pairs(self, deepest: int, num_layers: int) -> tuple[LayerPair, ...]:
        """See MatchedPart."""
        return _mapped(self.map, deepest, num_layers)

    @property
    def num_heads(self) -> int:
        """See MatchedPart."""
        return self.heads


class MatchedRelations(MatchedPart):
    """Relations among queries, keys and values (MiniLM), of caches with qkv. Widths and heads may differ."""

    reads = "qkv"

    heads: Positive
    """Relation heads: they divide the widths of teacher and student, and may be more than attention heads."""
    teacher_layer: Positive
    weight: WeightOrSchedule = 1.0
    student_layer: Literal["last"] | Positive = "last"

    def layer_pairs(self, deepest: int, num_layers: int) -> tuple[LayerPair, ...]:
        """See MatchedPart."""
        return ((self.teacher_layer, num_layers if self.student_layer == "last" else self.student_layer),)

    @property
    def num_heads(self) -> int:
        """See MatchedPart."""
        return self.heads


class Match(Section):
    """Hidden states that a student is matched with, and the weight of its predictions next to them."""

    prediction: WeightOrNone = 1.0
    """Weight of the recipe's other losses (alpha CE + (1 - alpha) soft). 0: hidden states alone; the best
    state is then that of the lowest matching loss on validation. All weights are numbers, or schedules over
    the steps like alpha."""
    states: MatchedStates | None = None
    embeddings: MatchedEmbeddings | None = None
    attention: MatchedAttention | None = None
    relations: MatchedRelations | None = None

    @property
    def parts(self) -> dict[str, MatchedPart]:
        """What is compared, by the names of the sections, in their order."""
        given = {name: getattr(self, name) for name in matched_parts()}
        return {name: part for name, part in given.items() if part is not None}

    @model_validator(mode="after")
    def _something(self) -> "Match":
        if not self.parts:
            *others, last = matched_parts()
            raise ValueError(f"nothing to match: name {', '.join(others)} or {last}")
        return self


def matched_parts() -> tuple[str, ...]:
    """The names of all sections of `match` that compare something."""
    return tuple(
        name
        for name, field in Match.model_fields.items()
        if any(
            isinstance(kind, type) and issubclass(kind, MatchedPart) for kind in get_args(field.annotation)
        )
    )
