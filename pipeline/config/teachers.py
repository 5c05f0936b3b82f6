"""Entries of params.yaml: `teachers`, models that are taken as they are or fine-tuned."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.base import Fraction, Name, Positive, Section, distinct


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): trained in place of the weights, then merged into them."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Adapters count alpha / rank."""
    dropout: Fraction = 0.0
    """Of what the adapters read."""
    targets: Annotated[
        Literal["auto"]
        | Annotated[tuple[str, ...], Field(min_length=1, strict=False), AfterValidator(distinct)],
        Field(union_mode="left_to_right"),
    ] = "auto"
    """Names of the linear layers that get adapters; auto: what is usual for the model's kind."""


class TeacherTraining(Section):
    """How a teacher is fine-tuned: AdamW, linear warm-up and decay, early stopping on validation."""

    epochs: Positive = 2
    batch_rows: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warmup: Fraction = 0.1
    """Share of all steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    dropout: Fraction | None = None
    """Dropout of hidden states and attention; null: what the model's own config says."""
    frozen_layers: Annotated[int, Field(ge=0)] | None = None
    """Leave the embeddings (0) and so many of the first layers as they are; null: train all. The embeddings
    are half of a small model's weights, low layers change little in a short fine-tuning, and gradients end
    above them."""
    evaluations_per_epoch: Positive = 2
    patience: Positive = 2
    """Evaluations without improvement before it stops. The best state is kept."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass. auto: bfloat16 where the hardware computes in it, else float32."""
    seed: Annotated[int, Field(ge=0)] = 0
    lora: Lora | None = None
    """Train adapters and the head alone; null: the weights."""

    @model_validator(mode="after")
    def _adapters_freeze(self) -> Self:
        if self.lora and self.frozen_layers is not None:
            raise ValueError("lora leaves all layers as they are but for its targets: remove frozen_layers")
        return self


class Embedding(Section):
    """How a teacher of sentence-embedding makes one vector of a row."""

    pool: Literal["first", "mean"] = "mean"
    """The first token's last hidden state, or the mean over the row's tokens."""
    normalised: bool = True
    """Whether vectors are divided by their length."""


class Teacher(Section):
    """A model, taken as it is or fine-tuned on a dataset."""

    model: Annotated[str, Field(min_length=1)]
    """A directory with config.json, *.safetensors and tokenizer files: local, or below assets/. A language
    model may also be a GGUF file, or a directory with one. Of images: without a tokenizer; a config.json with
    `model_type: stillroom-mlp` needs no weights either, and is trained here."""
    dataset: Name
    """The dataset that it is trained on (with `train`) and scored on."""
    labels: Annotated[tuple[str, ...], Field(strict=False), AfterValidator(distinct)] | None = None
    """Names of the head's outputs in order, where the model's own config does not name them."""
    max_length: Positive = 512
    """The most tokens that it reads of a row."""
    too_long: Literal["error", "truncate"] = "error"
    """What to do about longer rows. Truncated rows are counted in the capture's summary."""
    embedding: Embedding | None = None
    """Of sentence-embedding: how vectors are made; null: as the model's own modules.json says."""
    train: TeacherTraining | None = None
