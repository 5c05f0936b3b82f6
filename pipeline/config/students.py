"""Entries of params.yaml: `students`, a section a kind: its facts, its sizes and its first weights.

students/registry.py has the module of each kind, which builds it.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pipeline.config.base import Fraction, Layers, Positive, Section
from pipeline.config.tasks import ROW_OBJECTIVES, ModelInputs, ObjectiveName, TaskSpec


class Start(Section):
    """The first weights of a student's embeddings, instead of random ones."""

    embeddings: Literal["svd"]
    """svd: the best approximation of the teacher's input embeddings at the student's width."""

    @property
    def from_teacher(self) -> bool:
        """Whether the start needs the teacher's weights."""
        return True


class EncoderStart(Section):
    """The first weights of a student, instead of the usual random ones."""

    xavier: bool = False
    """Random weights by Glorot and Bengio (2010), uniform, in the linear layers."""
    layers: Layers | None = None
    """The teacher's layer for each layer of the student, in the student's order, with its embeddings and
    head. The cache has them; the student is as wide as the teacher."""
    embeddings: Literal["svd"] | None = None
    """svd: the best approximation of the teacher's input embeddings at the student's width."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.layers and (self.xavier or self.embeddings):
            raise ValueError("layers copies all weights of the teacher: remove xavier and embeddings")
        if not (self.layers or self.xavier or self.embeddings):
            raise ValueError("init is empty: write layers, xavier: true or embeddings: svd, or remove it")
        return self

    @property
    def from_teacher(self) -> bool:
        """Whether the start needs the teacher's weights."""
        return self.layers is not None or self.embeddings is not None


class Init(Section):
    """The first weights of a student, instead of random ones."""

    layers: Layers
    """The teacher's layer for each layer of the student, in the student's order; the cache has them."""


class Decoder(Section):
    """Sizes of a Llama-like student, and its first weights."""

    layers: Positive = 4
    width: Positive = 192
    heads: Positive = 3
    """Attention heads; the width of a head is even."""
    kv_heads: Positive | None = None
    """Heads of keys and values, each shared by as many attention heads; null: one for each."""
    inner: Positive | None = None
    """Width inside the feed-forward blocks; null: 8/3 of the width."""
    init: Init | None = None
    """The teacher's layers to start from; null: random weights."""

    @property
    def num_kv_heads(self) -> int:
        """`kv_heads`, or its default."""
        return self.kv_heads or self.heads

    @property
    def inner_width(self) -> int:
        """`inner`, or its default."""
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


# Keys of a transformers config that follow from the cache and the tokenizer.
SET_HERE = {"vocab_size", "num_labels", "id2label", "label2id", "pad_token_id", "model_type", "dtype"}


class TextReading(NamedTuple):
    """How a student reads text."""

    tokenizer: Literal["teacher"] | int  # int: entries of a tokenizer of its own
    max_length: int  # tokens


class LayerSizes(NamedTuple):
    """Of a student with attention layers."""

    layers: int
    width: int
    heads: int


class StudentSection(Section):
    """What the sections of all kinds share. Rooms read the facts of a kind and never compare kinds."""

    inputs: ClassVar[ModelInputs] = "text"  # of the tasks that it learns
    objectives: ClassVar[tuple[ObjectiveName, ...]] = ROW_OBJECTIVES  # what it can be trained for
    reads: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")  # of its forward, in its order
    exportable: ClassVar[bool] = False  # whether ONNX gives its logits
    matchable: ClassVar[bool] = False  # whether it has `layer_sizes`, and its model `features`
    starts_from: ClassVar[Literal["bert", "llama"] | None] = None  # teachers whose weights `init` can take
    configured_by: ClassVar[Literal["transformers"] | None] = None  # the library that checks its config

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3

    @classmethod
    def learns(cls, task: TaskSpec) -> bool:
        """Whether students of this kind can be trained on caches of a task."""
        return task.inputs == cls.inputs and task.objective in cls.objectives

    @property
    def text(self) -> TextReading | None:
        """How it reads text; None for kinds that read something else."""
        return None

    @property
    def layer_sizes(self) -> LayerSizes | None:
        """Of its attention layers; None for kinds without."""
        return None

    @property
    def has_init(self) -> bool:
        """Whether its entry names first weights other than the usual random ones."""
        return False

    @property
    def starts_from_teacher(self) -> bool:
        """Whether its first weights are made of the teacher's."""
        return False


class _Reader(StudentSection):
    tokenizer: Literal["teacher"] | Positive = "teacher"
    """`teacher`: the teacher's, from the cache. A number: a WordPiece tokenizer with this many entries,
    learned from the training and pool text."""
    max_length: Positive = 128
    """Most tokens of a row. The rest is cut; the run's record counts such rows."""

    @property
    def text(self) -> TextReading:
        """See StudentSection."""
        return TextReading(self.tokenizer, self.max_length)


class _TextStudent(_Reader):
    dropout: Fraction = 0.1


class EncoderSection(_TextStudent):
    """What the encoders of texts share: ours, of any size."""

    exportable = True
    starts_from = "bert"
    embedding_field: ClassVar[str] = "embedding"  # the field with the width of its embeddings
    if TYPE_CHECKING:  # a field of each section, at its own place in their order
        init: Start | EncoderStart | None

    @property
    def has_init(self) -> bool:
        """See StudentSection."""
        return self.init is not None

    @property
    def starts_from_teacher(self) -> bool:
        """See StudentSection."""
        return self.init is not None and self.init.from_teacher


def _reads_as_its_teacher(init: Any, info: ValidationInfo) -> Any:
    """The teacher's embeddings need its tokenizer."""
    if init is not None and init.from_teacher and info.data.get("tokenizer") != "teacher":
        raise ValueError("init takes the teacher's embeddings, and so needs its tokenizer: teacher")
    return init


class FCStudent(EncoderSection):
    """Mean of embeddings, then one hidden layer."""

    kind: Literal["fc"]
    embedding: Positive = 96
    hidden: Positive = 128
    init: Annotated[Start | None, AfterValidator(_reads_as_its_teacher)] = None
    """The first weights of its embeddings; null: random ones."""


class BiLSTMStudent(EncoderSection):
    """One bidirectional LSTM; max and mean over the row's tokens, then a linear layer."""

    kind: Literal["bilstm"]
    embedding: Positive = 96
    hidden: Positive = 64
    """Units of each direction."""
    init: Annotated[Start | None, AfterValidator(_reads_as_its_teacher)] = None
    """The first weights of its embeddings; null: random ones."""


class TinyBERTStudent(EncoderSection):
    """A BERT of a few narrow layers, from scratch."""

    matchable = True
    embedding_field = "width"

    kind: Literal["tinybert"]
    layers: Positive = 2
    width: Positive = 128
    heads: Positive = 2
    """Attention heads; they divide the width."""
    init: Annotated[EncoderStart | None, AfterValidator(_reads_as_its_teacher)] = None
    """Its first weights; null: random ones, normal with BERT's standard deviation of 0.02."""

    @property
    def layer_sizes(self) -> LayerSizes:
        """See StudentSection."""
        return LayerSizes(self.layers, self.width, self.heads)

    @model_validator(mode="after")
    def _heads_divide(self) -> "TinyBERTStudent":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.init and self.init.layers and len(self.init.layers) != self.layers:
            raise ValueError(f"init names {len(self.init.layers)} layers of the teacher for {self.layers}")
        return self


class LlamaStudent(_TextStudent, Decoder):
    """A Llama of any small size over the teacher's vocabulary, its head tied to its embeddings."""

    inputs = "documents"
    objectives = ("language_model",)
    reads = ("input_ids",)  # padding is on the right: no token attends to it
    starts_from = "llama"

    kind: Literal["llama"]
    max_length: Positive = 512
    """Most tokens of a piece of a row. Longer rows are read in several pieces."""
    dropout: Fraction = 0.0
    """Of attention weights."""

    @property
    def has_init(self) -> bool:
        """See StudentSection."""
        return self.init is not None

    @property
    def starts_from_teacher(self) -> bool:
        """See StudentSection."""
        return self.init is not None

    @model_validator(mode="after")
    def _init_needs_the_tokenizer(self) -> "LlamaStudent":
        if self.init and self.tokenizer != "teacher":
            raise ValueError("init takes the teacher's embeddings, and so needs its tokenizer: teacher")
        return self


class TransformersStudent(_Reader):
    """Any architecture of transformers with a sequence classifier, from random weights."""

    objectives = ("classification",)
    configured_by = "transformers"

    kind: Literal["transformers"]
    model_type: str
    """Its name in transformers: distilbert, electra, roberta, gpt2, ..."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Keys of its config and their values; other keys have transformers' defaults. Vocabulary, padding and
    labels follow from the cache, and so does the number of positions where it is not given."""

    @field_validator("config")
    @classmethod
    def _leaves_ours_alone(cls, config: dict[str, Any]) -> dict[str, Any]:
        if own := sorted(SET_HERE & set(config)):
            raise ValueError(f"{own[0]} follows from the cache and the tokenizer: remove it")
        return config


class MLPStudent(StudentSection):
    """Layers of ReLUs over all pixels of an image."""

    inputs = "images"
    reads = ("pixel_values",)

    kind: Literal["mlp"]
    hidden: Annotated[tuple[Positive, ...], Field(min_length=1, strict=False)] = (32,)
    """Units of each layer between the pixels and the logits."""
    dropout: Fraction = 0.1


Student = Annotated[
    FCStudent | BiLSTMStudent | TinyBERTStudent | LlamaStudent | TransformersStudent | MLPStudent,
    Field(discriminator="kind"),
]
# The sections of all kinds of students, by kind.
STUDENTS: dict[str, type[StudentSection]] = {
    get_args(section.model_fields["kind"].annotation)[0]: section
    for section in get_args(get_args(Student)[0])
}
