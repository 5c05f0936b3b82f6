"""The identity of a cache's contents: teacher, tokenizer, and what is stored of the teacher's outputs.

Two captures with the same `Identity` over the same rows have the same numbers (up to the rounding of
different machines), so the identity decides where finished shards are stored and which of them may be shared
or reused. The meaning of labels, splits and timings are not in it: they never change the teacher's outputs.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from storage.codecs import SparseCodec
from storage.fields import (
    MAX_LABELS,
    BlockNumber,
    ImageSide,
    LayerNumber,
    MaskShare,
    MaxLength,
    RowPool,
    Seed,
    StatePool,
    StateType,
    TooLong,
    VectorWidth,
)
from storage.fingerprints import Sha256, Strict, sha256_json
from storage.tasks import STORED_TASKS, Part, StoredTask, Task

QKV_PARTS = 3  # a vector of attention's queries, keys and values is this many vectors of a layer's width


class TeacherIdentity(Strict):
    """sha256 of the teacher's meaning: its tensors (names, shapes, dtypes, bytes) and its config."""

    weights: Sha256
    config: Sha256


class TokenizerIdentity(Strict):
    """The tokenizer: the content of its file and the settings outside it."""

    content: Sha256
    vocab_size: Annotated[int, Field(ge=1, le=2**31)]
    special_tokens: dict[str, int]
    padding_side: Literal["left", "right"]


class HiddenSpec(Strict):
    """Which vectors of the teacher are stored: its states after some layers (0 = embeddings), its queries,
    keys and values in some attention blocks (1 = the first); one a row, or (pool `none`) one a token.
    """

    layers: Annotated[tuple[LayerNumber, ...], Field(strict=False)]
    pool: StatePool
    width: VectorWidth
    dtype: StateType
    qkv: Annotated[tuple[BlockNumber, ...], Field(strict=False)] = ()
    pca: VectorWidth | None = None  # components that are kept of each layer's state
    basis: Sha256 | None = None  # with pca: storage.hidden.fingerprint of mean and axes

    @model_validator(mode="after")
    def _check(self) -> "HiddenSpec":
        if not self.layers and not self.qkv:
            raise ValueError("neither layers nor qkv are stored")
        if self.qkv and self.pool != "none":
            raise ValueError("queries, keys and values are stored for each token: pool is none")
        if self.pca is not None and (not self.layers or self.pca > self.width):
            raise ValueError(f"pca needs layers, and is at most their width {self.width}")
        if self.basis is not None and self.pca is None:
            raise ValueError("a basis needs pca")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = handler(self)
        return {key: value for key, value in body.items() if value or key not in ("qkv", "pca", "basis")}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the stored vectors: `layer.<n>`, then `qkv.<n>`."""
        return (*(f"layer.{n}" for n in self.layers), *(f"qkv.{n}" for n in self.qkv))

    @property
    def component_names(self) -> tuple[str, ...]:
        """Those of `names` that are stored as principal components."""
        return () if self.pca is None else self.names[: len(self.layers)]

    @property
    def files(self) -> tuple[str, ...]:
        """The files of a shard's Zarr group, relative to it, sorted."""
        arrays = [f"{name}/c.0.0" for name in self.names]
        if self.dtype == "int8":
            arrays += [f"{name}.scale/c.0" for name in self.names]
        return _group_files(arrays)

    @property
    def basis_files(self) -> tuple[str, ...]:
        """The files of the Zarr group of the principal axes, relative to it, sorted; empty without pca."""
        arrays = [f"{name}.{part}" for name in self.component_names for part in ("axes/c.0.0", "mean/c.0")]
        return _group_files(arrays) if arrays else ()

    def kept_width(self, name: str) -> int:
        """Numbers that are stored for a vector of this name."""
        return QKV_PARTS * self.width if name.startswith("qkv.") else self.pca or self.width

    @property
    def of_version_4(self) -> bool:
        """Whether a reader of format 3 cannot read them."""
        return self.pool == "none" or self.dtype == "int8" or self.pca is not None


def _group_files(arrays: Iterable[str]) -> tuple[str, ...]:
    """The files of a Zarr group of arrays with one shard file each."""
    own = [file for array in arrays for file in (array, f"{array.rpartition('/')[0]}/zarr.json")]
    return tuple(sorted([*own, "zarr.json"]))


class ImageSpec(Strict):
    """How images are read: `shape` (height, width, channels) of bytes b, each read as (b / 255 - mean) / std
    of its channel.
    """

    shape: Annotated[tuple[ImageSide, ...], Field(min_length=3, max_length=3, strict=False)]
    mean: Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], Field(strict=False)]
    std: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(strict=False)]

    @model_validator(mode="after")
    def _one_a_channel(self) -> "ImageSpec":
        if not len(self.mean) == len(self.std) == self.shape[2]:
            raise ValueError(f"mean and std are not {self.shape[2]} numbers each, one a channel")
        return self


class EmbeddingSpec(Strict):
    """How a row's vector of `width` numbers is made: the last hidden state of its first token, or the mean
    over its tokens; divided by its length if `normalised`.
    """

    width: VectorWidth
    pool: RowPool
    normalised: bool


class Mask(Strict):
    """Which positions of a row a masked language model does not see and predicts."""

    share: MaskShare
    seed: Seed


class Spec(Strict):
    """What is stored of a teacher's outputs, and how it is encoded."""

    task: Task
    # None: ids of a vocabulary, or a vector.
    labels: Annotated[tuple[str, ...], Field(max_length=MAX_LABELS, strict=False)]
    vocab_size: Annotated[int, Field(ge=2, le=2**31)] | None = None  # of language models
    codec: Literal["dense"] | Annotated[SparseCodec, Field(discriminator="name")]
    max_length: MaxLength
    too_long: TooLong
    precision: Literal["float32", "bfloat16"]
    hidden: HiddenSpec | None
    mask: Mask | None = None  # of masked language models
    image: ImageSpec | None = None  # of teachers that read images
    embedding: EmbeddingSpec | None = None  # of sentence-embedding

    @model_validator(mode="after")
    def _fits_its_task(self) -> "Spec":
        task = self.stored
        for part in get_args(Part):
            if (getattr(self, part) is None) == (part in task.parts):
                raise ValueError(f"{self.task} {'needs a' if part in task.parts else 'has no'} field {part}")
        if not task.min_labels and self.labels:
            raise ValueError(f"{self.task} has no labels")
        if len(self.labels) < task.min_labels:
            raise ValueError(f"{self.task} has labels, at least {task.min_labels}")
        if task.codecs not in ("any", "dense" if self.sparse is None else "sparse"):
            expected = "the codec dense" if task.codecs == "dense" else "a sparse codec"
            raise ValueError(f"{self.task} has {expected}")
        if self.per_position and self.hidden is not None and self.hidden.pool != "none":
            raise ValueError("where there is a target a token, hidden states are one a token: pool is none")
        return self

    @model_serializer(mode="wrap")
    def _without_what_does_not_apply(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = handler(self)
        for name in get_args(Part):
            if body[name] is None:
                del body[name]
        return body

    @property
    def sparse(self) -> SparseCodec | None:
        """The sparse codec; None where every number is kept (dense)."""
        return None if self.codec == "dense" else self.codec

    @property
    def sampled(self) -> bool:
        """Whether the targets are random draws from the teacher's distribution."""
        return self.sparse is not None and self.sparse.sampled

    @property
    def ranked(self) -> bool:
        """Whether shards number ids by their ranks in the cache's table of frequent ids."""
        return self.sparse is not None and self.sparse.layout == "compact"

    @property
    def num_outputs(self) -> int:
        """Classes, ids of the vocabulary, or numbers of a row."""
        return self.embedding.width if self.embedding else self.vocab_size or len(self.labels)

    @property
    def stored(self) -> StoredTask:
        """What the format knows of the task."""
        return STORED_TASKS[self.task]

    @property
    def per_position(self) -> bool:
        """Whether a row's targets belong to its tokens, and not one to all of it."""
        return self.stored.per_position

    @property
    def column(self) -> str:
        """What the numbers of a row are called in a shard of dense targets."""
        return self.stored.column


class Identity(Strict):
    """Everything, apart from the rows themselves, that decides a shard's numbers."""

    capture_version: Annotated[int, Field(ge=1, le=2**31)]
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity | None  # none where images are read
    spec: Spec

    @model_validator(mode="after")
    def _text_has_a_tokenizer(self) -> "Identity":
        if (self.tokenizer is None) != (self.spec.image is not None):
            raise ValueError("text is read with a tokenizer, images without one")
        return self

    @property
    def fingerprint(self) -> str:
        """sha256 hex of the canonical JSON of this identity."""
        return sha256_json(self.model_dump(mode="json"))


def shard_key(identity: Identity, row_ids: Sequence[str], input_hashes: Sequence[str]) -> str:
    """The name of a shard: sha256 hex of everything that decides its numbers."""
    digest = hashlib.sha256(identity.fingerprint.encode())
    for row, inputs in zip(row_ids, input_hashes, strict=True):
        digest.update(f"{row}{inputs}".encode())
    return digest.hexdigest()
