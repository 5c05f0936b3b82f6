"""Types of fields that params.yaml and the files of a cache share: what one accepts, the other can hold."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

EntryName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
CacheUrl = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9+.-]*://\S+$", max_length=2000)]

MAX_LABELS = 100_000
MaxLength = Annotated[int, Field(ge=1, le=2**31)]  # tokens of a row
TooLong = Literal["error", "truncate"]  # what happens to longer rows
ImageSide = Annotated[int, Field(ge=1, le=2**15)]  # pixels
MaskShare = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]  # of the tokens that are not special

LayerNumber = Annotated[int, Field(ge=0, le=10_000)]  # 0: the embeddings
BlockNumber = Annotated[int, Field(ge=1, le=10_000)]  # of attention; 1: between layers 0 and 1
VectorWidth = Annotated[int, Field(ge=1, le=2**20)]  # numbers of a state, of a vector, or components of one
RowPool = Literal["first", "mean"]  # one vector a row: the first token's state, or the mean over its tokens
StatePool = Literal["first", "mean", "none"]  # none: one vector a token
StateType = Literal["float16", "float32", "int8"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Missing = Literal["error", "skip"]  # for rows that one cache of a mixture lacks
