"""Entries of params.yaml: `recipes.NAME.match`, the teacher's inner states, for the student."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.schedules import Weight, WeightOrNone
from pipeline.section import Positive, Section

Layer = Annotated[int, Field(ge=0)]
LayerPair = Annotated[tuple[Layer, Layer], Field(strict=False)]
LayerMap = (
    Literal["uniform", "top", "bottom"] | Annotated[tuple[LayerPair, ...], Field(min_length=1, strict=False)]
)


class MatchedStates(Section):
    """Outputs of layers. Per position or pooled, as the cache keeps them: the student's are pooled alike."""

    weight: Weight = 1.0
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

    weight: Weight = 1.0
    project: bool = True
    """Through a learned matrix of their own. false: as they are; widths must be equal."""


class MatchedAttention(Section):
    """Attention scores before the softmax, of caches with qkv."""

    heads: Positive
    """Attention heads of the teacher: the cache has its vectors before they are cut into heads. The student
    must have as many."""
    weight: Weight = 1.0
    map: LayerMap = "uniform"
    """As for states, over the layers whose qkv the cache keeps."""


class MatchedRelations(Section):
    """Relations of queries, of keys and of values, of caches with qkv. Widths and heads may differ."""

    heads: Positive
    """Relation heads: they divide the widths of teacher and student. More than attention heads are well."""
    teacher_layer: Positive
    weight: Weight = 1.0
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
