"""The kinds of students that params.yaml knows, and their sizes. students.py builds them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.decoders import Decoder
from pipeline.encoders import EncoderStart, Start
from pipeline.section import Fraction, Positive, Section

# Keys of a transformers config that the cache and the tokenizer decide.
SET_HERE = {"vocab_size", "num_labels", "id2label", "label2id", "pad_token_id", "model_type", "dtype"}


class _Trained(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class _Reader(_Trained):
    tokenizer: Literal["teacher"] | Positive = "teacher"
    """`teacher`: the teacher's, from the cache. A number: its own WordPiece of so many entries, learned from
    the training and pool text."""
    max_length: Positive = 128
    """The most tokens that it reads of a row. The rest is cut; the run's record counts the rows."""


class _Student(_Reader):
    dropout: Fraction = 0.1


def _reads_as_its_teacher(init: Any, info: ValidationInfo) -> Any:
    """Teacher's embeddings go with its tokenizer."""
    if init is not None and init.from_teacher and info.data.get("tokenizer") != "teacher":
        raise ValueError("init takes the teacher's embeddings, and so needs its tokenizer: teacher")
    return init


class FC(_Student):
    """Mean of embeddings, then one hidden layer."""

    kind: Literal["fc"]
    embedding: Positive = 96
    hidden: Positive = 128
    init: Annotated[Start | None, AfterValidator(_reads_as_its_teacher)] = None
    """Where its embeddings start; null: at random numbers."""


class BiLSTM(_Student):
    """One bidirectional LSTM; max and mean over the row's tokens, then a linear layer."""

    kind: Literal["bilstm"]
    embedding: Positive = 96
    hidden: Positive = 64
    """Units of each direction."""
    init: Annotated[Start | None, AfterValidator(_reads_as_its_teacher)] = None
    """Where its embeddings start; null: at random numbers."""


class TinyBERT(_Student):
    """A BERT of a few narrow layers, from scratch."""

    kind: Literal["tinybert"]
    layers: Positive = 2
    width: Positive = 128
    heads: Positive = 2
    """Attention heads; they divide the width."""
    init: Annotated[EncoderStart | None, AfterValidator(_reads_as_its_teacher)] = None
    """Where it starts; null: at random weights, normal, of BERT's 0.02."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyBERT":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.init and self.init.layers and len(self.init.layers) != self.layers:
            raise ValueError(f"init names {len(self.init.layers)} layers of the teacher for {self.layers}")
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


class Transformers(_Reader):
    """Any architecture that transformers has a classifier of rows for, from random weights."""

    kind: Literal["transformers"]
    model_type: str
    """As transformers calls it: distilbert, electra, roberta, gpt2, ..."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of its config and their values; others have transformers' defaults. Vocabulary, padding and labels
    are set here, and positions where they are not given."""

    @field_validator("config")
    @classmethod
    def _leaves_ours_alone(cls, config: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(SET_HERE & set(config)):
            raise ValueError(f"{own[0]} follows from the cache and the tokenizer: remove it")
        return config


class MLP(_Trained):
    """Layers of ReLUs over all numbers of an image."""

    kind: Literal["mlp"]
    hidden: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] = (32,)
    """Units of each layer between the pixels and the logits."""
    dropout: Fraction = 0.1


Student = Annotated[FC | BiLSTM | TinyBERT | Llama | Transformers | MLP, Field(discriminator="kind")]
