"""Entries of params.yaml: `caches`, `mixtures` and `received`, with the codec and its settings.

docs/codecs.md says how to choose a codec.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.base import Layers, Name, Positive, Section, distinct
from pipeline.config.tasks import TASKS
from storage.codecs import Codec, NumEntries, Sample, SparseSpec, Tau, Threshold, TopK
from storage.fields import (
    BlockNumber,
    CacheUrl,
    LayerNumber,
    MaskShare,
    Missing,
    Seed,
    StatePool,
    StateType,
    VectorWidth,
)
from storage.fingerprints import Sha256
from storage.spec import Mask
from storage.tasks import Task


class Weights(Section):
    """Weights of the teacher that students may start from: some layers, its embeddings and its head."""

    layers: Layers
    """Layers of the teacher; 0 is the first. At least one, also where students use the embeddings alone."""


class Dense(Section):
    """The logit of every class: for few classes."""

    codec: Literal["dense"]
    sparse: ClassVar[bool] = False

    def spec(self, ranks: Sha256 | None) -> Codec:
        """The codec as a cache's spec names it. It has no table of ranks."""
        return "dense"


class _SparseTargets(Section):
    sparse: ClassVar[bool] = True
    spec_class: ClassVar[type[SparseSpec]]

    layout: Literal["compact", "plain"] = "compact"
    """compact: half the bytes, or less. plain: exact ids and log-probabilities that any tool can read."""

    def spec(self, ranks: Sha256 | None) -> Codec:
        """The codec as a cache's spec names it; `ranks` is the fingerprint of a compact layout's table.

        The settings have the same names here and there, apart from `codec`, which is the spec's `name`.
        """
        settings = self.model_dump(exclude={"codec"})
        spec: Codec = self.spec_class(**settings, ranks=ranks if self.layout == "compact" else None)  # type: ignore[assignment]
        return spec


class TopKTargets(_SparseTargets):
    """The k largest probabilities and the exact mass of all others. Biased: see docs/codecs.md."""

    spec_class = TopK

    codec: Literal["topk"]
    k: NumEntries = 64


class SampleTargets(_SparseTargets):
    """Random sampling: `draws` draws from the teacher, as counts. Unbiased."""

    spec_class = Sample

    codec: Literal["sample"]
    draws: NumEntries = 50
    seed: Seed = 0


class ThresholdTargets(_SparseTargets):
    """Probabilities above about tau exactly, the rest sampled in steps of tau. Unbiased, and the smallest."""

    spec_class = Threshold

    codec: Literal["threshold"]
    tau: Tau = 0.07
    """Smaller: more entries, less noise. 0.07 keeps about 10 entries of a language model's position."""
    seed: Seed = 0


class MaskedShare(Section):
    """Which tokens of a row are masked for a masked language model. They are the same in every capture."""

    share: MaskShare = 0.15
    """Share of the row's tokens, special tokens excepted; at least one token is masked."""
    seed: Seed = 0


def _named(value: Any) -> Any:
    """`targets: threshold` is short for `targets: {codec: threshold}`."""
    return {"codec": value} if isinstance(value, str) else value


Targets = Annotated[
    Dense | TopKTargets | SampleTargets | ThresholdTargets,
    Field(discriminator="codec"),
    BeforeValidator(_named),
]


class Hidden(Section):
    """Hidden states of the teacher that are kept with its targets."""

    layers: Annotated[tuple[LayerNumber, ...], Field(strict=False), AfterValidator(distinct)] = ()
    """Layers as in transformers' hidden_states: 0 is the embeddings."""
    qkv: Annotated[tuple[BlockNumber, ...], Field(strict=False), AfterValidator(distinct)] = ()
    """Attention blocks whose queries, keys and values are kept, before they are split into heads: 1 is the
    first, between layers 0 and 1. Three vectors of the layers' width a token; only with pool: none."""
    pool: StatePool = "mean"
    """One vector a row (the state of the first token, or the mean over the row's tokens), or none: one a
    token. Teachers with a target a token need none."""
    dtype: StateType = "float16"
    """int8: each vector is divided by its largest number / 127, which is kept too."""
    pca: VectorWidth | None = None
    """Number of principal components that are kept of each layer's states; null: whole states. Queries, keys
    and values are always kept whole."""

    @model_validator(mode="after")
    def _fields_fit(self) -> "Hidden":
        if not self.layers and not self.qkv:
            raise ValueError("name the layers to keep, or the attention blocks (qkv)")
        if self.qkv and self.pool != "none":
            raise ValueError(f"qkv is kept of each token: write pool: none, not {self.pool}")
        if self.pca is not None and not self.layers:
            raise ValueError("pca is of layers: name layers, or remove pca")
        return self


class CacheEntry(Section):
    """The rows that a teacher answers, and what is kept of its answers."""

    dataset: Name
    teacher: Name
    targets: Targets = Dense(codec="dense")
    """The codec and its settings: dense (few classes), or a sparse one (vocabularies)."""
    mask: MaskedShare | None = None
    """Of masked language models: which tokens are masked; null: the default settings."""
    hidden: Hidden | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the teacher's arithmetic. auto: bfloat16 where the hardware computes in it, otherwise float32."""
    shard_rows: Positive = 4096
    """Rows a shard, which is written, verified and retried as one. For documents about 128 are enough."""
    weights: Weights | None = None


class MixtureEntry(Section):
    """Two caches that a run reads as one: the probabilities of their teachers are averaged.

    Two, because DVC gives all entries of a section the same kinds of dependencies. A mixture may be one of
    the two, so a mixture can have any number of teachers.
    """

    caches: Annotated[tuple[Name, Name], Field(strict=False), AfterValidator(distinct)]
    """Dense caches with the same labels. `tokenizer: teacher` means the tokenizer of the first."""
    weights: Annotated[
        tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], Field(strict=False)
    ] = (1.0, 1.0)
    """Weights of the two caches. Only their ratio matters."""
    missing: Missing = "error"
    """Training rows that one of the caches lacks: error refuses the run, skip leaves them out. Rows of
    validation and test must be in both."""


class Received(Section):
    """A cache at a URL, made elsewhere and copied there by `stillroom publish`."""

    url: CacheUrl
    """Like s3://bucket/caches/reviews. Credentials and the service's address come from the environment."""
    manifest: Sha256
    """Digest of the cache's manifest, which covers every byte; `stillroom publish` prints it."""


def mask_spec(task: Task, entry: MaskedShare | None) -> Mask | None:
    """The mask of a cache's spec; None for tasks without masks."""
    return Mask(**(entry or MaskedShare()).model_dump()) if TASKS[task].masked else None
