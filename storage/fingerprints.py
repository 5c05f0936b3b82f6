"""How values, rows and inputs become digests."""

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
ROW_ID_CHARS = 32  # 128 bits in hex: 10^12 rows collide with probability 10^-15


class Strict(BaseModel):
    """Frozen, no unknown key, no silent conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def canonical_json(value: Any) -> bytes:
    """The bytes of a value, for hashing: sorted keys, no spaces, UTF-8. Raises ValueError for NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_json(value: Any) -> str:
    """sha256 hex of `canonical_json(value)`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def row_id(source: str, content: str) -> str:
    """The permanent name of a row: 32 hex characters of sha256 over its source and its content.

    Labels and splits are left out on purpose: a corrected label must not run the teacher again.
    """
    return hashlib.sha256(f"{source}\x00{content}".encode()).hexdigest()[:ROW_ID_CHARS]


def input_hash(token_ids: npt.ArrayLike) -> str:
    """32 hex characters of sha256 over the row's token ids (little-endian int32, special ones too)."""
    return hashlib.sha256(np.asarray(token_ids, "<i4").tobytes()).hexdigest()[:ROW_ID_CHARS]


def pixels_hash(pixels: bytes) -> str:
    """The input hash of an image: 32 hex characters of sha256 over its pixels."""
    return hashlib.sha256(pixels).hexdigest()[:ROW_ID_CHARS]


def content_fingerprint(row_ids: Iterable[str]) -> str:
    """sha256 hex of a set of rows: their distinct ids, sorted. Neither order nor repeats change it."""
    return hashlib.sha256("".join(sorted(set(row_ids))).encode()).hexdigest()
