"""The kinds of students that params.yaml knows, and their sizes. students.py builds them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.decoders import Decoder
from pipeline.section import Fraction, Positive, Section


class _Trained(Section):
    dropout: Fraction = 0.1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class _Student(_Trained):
    tokenizer: Literal["teacher"] | Positive = "teacher"
    """`teacher`: the teacher's, from the cache. A number: its own WordPiece of so many entries, learned from
    the training and pool text."""
    max_length: Positive = 128
    """The most tokens that it reads of a row. The rest is cut; the run's record counts the rows."""


class FC(_Student):
    """Mean of embeddings, then one hidden layer."""

    kind: Literal["fc"]
    embedding: Positive = 96
    hidden: Positive = 128


class BiLSTM(_Student):
    """One bidirectional LSTM; max and mean over the row's tokens, then a linear layer."""

    kind: Literal["bilstm"]
    embedding: Positive = 96
    hidden: Positive = 64
    """Units of each direction."""


class TinyBERT(_Student):
    """A BERT of a few narrow layers, from scratch."""

    kind: Literal["tinybert"]
    layers: Positive = 2
    width: Positive = 128
    heads: Positive = 2
    """Attention heads; they divide the width."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyBERT":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Llama(_Student, Decoder):
    """A Llama of any small size over the teacher's vocabulary, its head tied to its embeddings."""

    kind: Literal["llama"]
    max_length: Positive = 512
    """The most tokens that it reads at a time. Longer rows are read in pieces, one after the other."""
    dropout: Fraction = 0.0
    """Of attention weights."""

    @model_validator(mode="after")
    def _init_needs_the_tokenizer(self) -> "Llama":
        if self.init and self.tokenizer != "teacher":
            raise ValueError("init takes the teacher's embeddings, and so needs its tokenizer: teacher")
        return self


class MLP(_Trained):
    """Layers of ReLUs over all numbers of an image."""

    kind: Literal["mlp"]
    hidden: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] = (32,)
    """Units of each layer between the pixels and the logits."""


Student = Annotated[FC | BiLSTM | TinyBERT | Llama | MLP, Field(discriminator="kind")]
