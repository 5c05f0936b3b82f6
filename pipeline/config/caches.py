"""Entries of params.yaml: `caches`, `mixtures` and `received`, with the codec and its settings.

docs/codecs.md says how to choose a codec.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config.base import Layers, Name, Positive, Section, distinct
from pipeline.config.tasks import TASKS
from storage.codecs import Codec, NumEntries, Sample, SparseSpec, Tau, Threshold, TopK
from storage.fingerprints import Seed, Sha256
from storage.spec import Mask
from storage.tasks import Task


class Weights(Section):
    """Weights of the teacher that students may start from: some of its layers, and what is around them."""

    layers: Layers
    """Of the teacher, the first one 0. One at least, also where students take its embeddings alone."""


class Dense(Section):
    """Every class's logit: for few classes."""

    codec: Literal["dense"]
    sparse: ClassVar[bool] = False

    def spec(self, ranks: Sha256 | None) -> Codec:
        """The codec as a cache's spec names it. It has no table of ranks."""
        return "dense"


class _SparseTargets(Section):
    sparse: ClassVar[bool] = True
    spec_class: ClassVar[type[SparseSpec]]

    layout: Literal["compact", "plain"] = "compact"
    """compact: half the bytes, or less. plain: ids and log-probabilities for any tool, to the bit."""

    def spec(self, ranks: Sha256 | None) -> Codec:
        """The codec as a cache's spec names it; `ranks` is the fingerprint of a compact layout's table.

        The settings have the same names here and there, apart from `codec`, which is the spec's `name`.
        """
        settings = self.model_dump(exclude={"codec"})
        spec: Codec = self.spec_class(**settings, ranks=ranks if self.layout == "compact" else None)  # type: ignore[assignment]
        return spec


class TopKTargets(_SparseTargets):
    """The k largest probabilities and the exact mass of the rest. Biased: see docs/codecs.md."""

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
    """What a masked language model does not see of a row, and is asked about. Chosen once, for ever."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Of the row's tokens that are not special ones; at least one is masked."""
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


def mask_spec(task: Task, entry: MaskedShare | None) -> Mask | None:
    """What is hidden from a teacher of this task, as the cache knows it."""
    return Mask(**(entry or MaskedShare()).model_dump()) if TASKS[task].masked else None
