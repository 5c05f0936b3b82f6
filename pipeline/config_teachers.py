"""Entries of params.yaml: `teachers`, `caches`, what they are asked, and `mixtures` of caches."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.decoders import Weights
from pipeline.section import Fraction, Name, Positive, Section, distinct
from pipeline.targets import Dense, MaskedShare, Targets


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


class Hidden(Section):
    """Hidden states to keep beside the logits."""

    layers: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False), AfterValidator(distinct)
    ] = ()
    """Layers in the sense of transformers' hidden_states: 0 is the embeddings."""
    qkv: Annotated[tuple[Positive, ...], Field(strict=False), AfterValidator(distinct)] = ()
    """Attention blocks whose queries, keys and values are kept, before they are split in heads: 1 is the
    first, between layers 0 and 1. Three vectors of the layers' width a token; only with pool: none."""
    pool: Literal["first", "mean", "none"] = "mean"
    """One vector a row (the first token's state, or the mean over the row's tokens), or none: each token's.
    Teachers with a target a token have no others than these."""
    dtype: Literal["float16", "float32", "int8"] = "float16"
    """int8: each vector over its largest number / 127, which is kept beside it."""
    pca: Positive | None = None
    """Principal components that are kept of each layer's states; null: the states as they are. Queries, keys
    and values are always kept as they are."""

    @model_validator(mode="after")
    def _something_that_there_is(self) -> "Hidden":
        if not self.layers and not self.qkv:
            raise ValueError("name the layers to keep, or the attention blocks (qkv)")
        if self.qkv and self.pool != "none":
            raise ValueError(f"qkv is kept of each token: write pool: none, not {self.pool}")
        if self.pca is not None and not self.layers:
            raise ValueError("pca is of layers, and none is named")
        return self


class CacheEntry(Section):
    """What to ask a teacher about which rows."""

    dataset: Name
    teacher: Name
    targets: Targets = Dense(codec="dense")
    """The codec, and its settings: dense (few classes), or one of the sparse ones (vocabularies)."""
    mask: MaskedShare | None = None
    """Only of a masked language model: what is hidden from it; null: the default settings."""
    hidden: Hidden | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the teacher's arithmetic. auto: bfloat16 where the hardware computes in it, else float32."""
    shard_rows: Positive = 4096
    """Rows a shard: what is written, verified and retried as one. Documents are long: take 128 or so."""
    weights: Weights | None = None


class MixtureEntry(Section):
    """Two caches that a run reads as one: the probabilities of their teachers are averaged.

    Two, because every entry of a shelf depends on the same kinds of things for DVC; a mixture may be one of
    the two, and so there can be any number.
    """

    caches: Annotated[tuple[Name, Name], Field(strict=False), AfterValidator(distinct)]
    """Dense ones, of the same labels. Where a student's tokenizer is the teacher's, it is the first one's."""
    weights: Annotated[
        tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], Field(strict=False)
    ] = (1.0, 1.0)
    """How much each counts, beside the other."""
    missing: Literal["error", "skip"] = "error"
    """What to do about rows to train on that one of them lacks: refuse the run, or leave them out. Rows of
    validation and test must be in both."""


class Received(Section):
    """A cache that others made, and that lies at a URL: `python -m stages.publish` put it there."""

    url: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://\S+$")]
    """Like s3://bucket/caches/reviews. Who may read it, and where the service is, its environment says."""
    manifest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """What the cache was when you chose it: `publish` prints it. It stands for every byte."""
