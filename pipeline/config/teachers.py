"""Entries of params.yaml: `teachers`, models that are used as they are or fine-tuned."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.base import Fraction, LabelNames, Name, Positive, Section, distinct
from storage.fields import MaxLength, RowPool, Seed, TooLong


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): trained instead of the weights, then merged into them."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Of the adapters' inputs."""
    targets: Annotated[
        Literal["auto"]
        | Annotated[tuple[str, ...], Field(min_length=1, strict=False), AfterValidator(distinct)],
        Field(union_mode="left_to_right"),
    ] = "auto"
    """Names of the linear layers that get adapters; auto: peft's default for the model's type."""


class TeacherTraining(Section):
    """How a teacher is fine-tuned: AdamW, linear warm-up and decay, early stopping on validation."""

    epochs: Positive = 2
    batch_rows: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup: Fraction = 0.1
    """Share of all steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    dropout: Fraction | None = None
    """Dropout of hidden states and attention; null: as in the model's own config."""
    frozen_layers: Annotated[int, Field(ge=0)] | None = None
    """Number of first layers that are not trained, nor the embeddings (0: the embeddings alone); null: all
    are trained. Embeddings are half of a small model's weights, low layers change little in a short
    fine-tuning, and gradients end above them."""
    evaluations_per_epoch: Positive = 2
    patience: Positive = 2
    """Evaluations without improvement before the training stops. The best state is kept."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass. auto: bfloat16 where the hardware computes in it, otherwise float32."""
    seed: Seed = 0
    lora: Lora | None = None
    """Trains adapters and the head alone; null: all weights."""

    @model_validator(mode="after")
    def _adapters_freeze(self) -> Self:
        if self.lora and self.frozen_layers is not None:
            raise ValueError("lora trains its adapters and the head alone: remove frozen_layers")
        return self


class Embedding(Section):
    """How a teacher of sentence-embedding makes the vector of a row."""

    pool: RowPool = "mean"
    """The first token's last hidden state, or the mean over the row's tokens."""
    normalised: bool = True
    """Whether vectors are divided by their length."""


class Teacher(Section):
    """A model, used as it is or fine-tuned on a dataset."""

    model: Annotated[str, Field(min_length=1)]
    """A directory with config.json, *.safetensors and tokenizer files: local, or below assets/. A language
    model may also be a GGUF file, or a directory with one. A model of images has no tokenizer; with
    `model_type: stillroom-mlp` in config.json it needs no weights either, and is trained here."""
    dataset: Name
    """The dataset that the teacher is trained on (with `train`) and scored on."""
    labels: LabelNames | None = None
    """Names of the head's outputs in order, where the model's own config does not have them."""
    max_length: MaxLength = 512
    """Most tokens of a row."""
    too_long: TooLong = "error"
    """What happens to longer rows: an error, or they are truncated and counted in the capture's summary."""
    embedding: Embedding | None = None
    """Of sentence-embedding: how vectors are made; null: as in the model's own modules.json."""
    train: TeacherTraining | None = None
