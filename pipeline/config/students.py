"""The kinds of students that params.yaml knows, and their sizes. students/registry.py builds them."""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.config.base import Fraction, Layers, Positive, Section
from pipeline.config.tasks import ROW_OBJECTIVES, ModelInputs, ObjectiveName, TaskSpec


class Start(Section):
    """Where a student's embeddings start, instead of at random numbers."""

    embeddings: Literal["svd"]
    """svd: at the teacher's input embeddings, as well as the student's width can have them."""

    @property
    def from_teacher(self) -> bool:
        """Whether it needs the teacher's weights."""
        return True


class EncoderStart(Section):
    """Where a student starts, instead of at the usual random weights."""

    xavier: bool = False
    """Random weights by Glorot and Bengio (2010), uniform, in the linear maps."""
    layers: Layers | None = None
    """The teacher's layer for each of the student's, in the student's order, and its embeddings and head. The
    cache carries them; the student is as wide as the teacher."""
    embeddings: Literal["svd"] | None = None
    """svd: the teacher's input embeddings, as well as the student's width can have them."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.layers and (self.xavier or self.embeddings):
            raise ValueError("layers brings all weights of the teacher: remove xavier and embeddings")
        if not (self.layers or self.xavier or self.embeddings):
            raise ValueError("init says nothing: write layers, xavier: true or embeddings: svd, or remove it")
        return self

    @property
    def from_teacher(self) -> bool:
        """Whether it needs the teacher's weights."""
        return self.layers is not None or self.embeddings is not None


class Init(Section):
    """Where a student starts, instead of at random weights."""

    layers: Layers
    """The teacher's layer for each of the student's, in the student's order; the cache carries them."""


class Decoder(Section):
    """Sizes of a Llama-like student, and where it starts."""

    layers: Positive = 4
    width: Positive = 192
    heads: Positive = 3
    """Attention heads; they divide the width into even parts."""
    kv_heads: Positive | None = None
    """Heads of keys and values, each for as many attention heads; null: one for each."""
    inner: Positive | None = None
    """Width inside the feed-forward blocks; null: 8/3 of the width."""
    init: Init | None = None
    """The teacher's layers to start from; null: random weights."""

    @property
    def num_kv_heads(self) -> int:
        """`kv_heads`, or what null means."""
        return self.kv_heads or self.heads

    @property
    def inner_width(self) -> int:
        """`inner`, or what null means."""
        return self.inner or 8 * (-(-self.width // 3))

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} is not an even multiple of heads {self.heads}")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.init and len(self.init.layers) != self.layers:
            raise ValueError(f"init names {len(self.init.layers)} layers of the teacher for {self.layers}")
        return self


# Keys of a transformers config that the cache and the tokenizer decide.
SET_HERE = {"vocab_size", "num_labels", "id2label", "label2id", "pad_token_id", "model_type", "dtype"}


class _Trained(Section):
    inputs: ClassVar[ModelInputs] = "text"  # of the tasks that it learns
    objectives: ClassVar[tuple[ObjectiveName, ...]] = ROW_OBJECTIVES  # what it can be trained for

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3

    @classmethod
    def learns(cls, task: TaskSpec) -> bool:
        """Whether students of this kind can be trained on caches of a task."""
        return task.inputs == cls.inputs and task.objective in cls.objectives


class _Reader(_Trained):
    tokenizer: Literal["teacher"] | Positive = "teacher"
    """`teacher`: the teacher's, from the cache. A number: its own WordPiece of so many entries, learned from
    the training and pool text."""
    max_length: Positive = 128
    """The most tokens that it reads of a row. The rest is cut; the run's record counts the rows."""


class _TextStudent(_Reader):
    dropout: Fraction = 0.1


def _reads_as_its_teacher(init: Any, info: ValidationInfo) -> Any:
    """Teacher's embeddings go with its tokenizer."""
    if init is not None and init.from_teacher and info.data.get("tokenizer") != "teacher":
        raise ValueError("init takes the teacher's embeddings, and so needs its tokenizer: teacher")
    return init


class FCStudent(_TextStudent):
    """Mean of embeddings, then one hidden layer."""

    kind: Literal["fc"]
    embedding: Positive = 96
    hidden: Positive = 128
    init: Annotated[Start | None, AfterValidator(_reads_as_its_teacher)] = None
    """Where its embeddings start; null: at random numbers."""


class BiLSTMStudent(_TextStudent):
    """One bidirectional LSTM; max and mean over the row's tokens, then a linear layer."""

    kind: Literal["bilstm"]
    embedding: Positive = 96
    hidden: Positive = 64
    """Units of each direction."""
    init: Annotated[Start | None, AfterValidator(_reads_as_its_teacher)] = None
    """Where its embeddings start; null: at random numbers."""


class TinyBERTStudent(_TextStudent):
    """A BERT of a few narrow layers, from scratch."""

    kind: Literal["tinybert"]
    layers: Positive = 2
    width: Positive = 128
    heads: Positive = 2
    """Attention heads; they divide the width."""
    init: Annotated[EncoderStart | None, AfterValidator(_reads_as_its_teacher)] = None
    """Where it starts; null: at random weights, normal, of BERT's 0.02."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyBERTStudent":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.init and self.init.layers and len(self.init.layers) != self.layers:
            raise ValueError(f"init names {len(self.init.layers)} layers of the teacher for {self.layers}")
        return self


class LlamaStudent(_TextStudent, Decoder):
    """A Llama of any small size over the teacher's vocabulary, its head tied to its embeddings."""

    inputs: ClassVar[ModelInputs] = "documents"
    objectives: ClassVar[tuple[ObjectiveName, ...]] = ("language_model",)

    kind: Literal["llama"]
    max_length: Positive = 512
    """The most tokens that it reads at a time. Longer rows are read in pieces, one after the other."""
    dropout: Fraction = 0.0
    """Of attention weights."""

    @model_validator(mode="after")
    def _init_needs_the_tokenizer(self) -> "LlamaStudent":
        if self.init and self.tokenizer != "teacher":
            raise ValueError("init takes the teacher's embeddings, and so needs its tokenizer: teacher")
        return self


class TransformersStudent(_Reader):
    """Any architecture that transformers has a classifier of rows for, from random weights."""

    objectives: ClassVar[tuple[ObjectiveName, ...]] = ("classification",)

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


class MLPStudent(_Trained):
    """Layers of ReLUs over all numbers of an image."""

    inputs: ClassVar[ModelInputs] = "images"
    objectives: ClassVar[tuple[ObjectiveName, ...]] = ("classification",)

    kind: Literal["mlp"]
    hidden: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] = (32,)
    """Units of each layer between the pixels and the logits."""
    dropout: Fraction = 0.1


Student = Annotated[
    FCStudent | BiLSTMStudent | TinyBERTStudent | LlamaStudent | TransformersStudent | MLPStudent,
    Field(discriminator="kind"),
]
# The sections of all kinds of students, by kind.
STUDENTS: dict[str, type[_Trained]] = {
    get_args(section.model_fields["kind"].annotation)[0]: section
    for section in get_args(get_args(Student)[0])
}
