"""The sparse codecs as a cache names them."""

from typing import Annotated, Literal

from pydantic import Field

from storage.fingerprints import Sha256, Strict


class SparseSpec(Strict):
    """What all sparse codecs have."""

    layout: Literal["plain", "compact"]
    ranks: Sha256 | None = None  # of a compact layout: the fingerprint of the manifest's `ranks`


class TopK(SparseSpec):
    """The `k` largest probabilities, and the log mass of all others."""

    name: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=1, le=65_535)]


class Sample(SparseSpec):
    """`draws` draws with replacement, as counts (random sampling KD: Anshumann et al., ACL 2025)."""

    name: Literal["sample"] = "sample"
    draws: Annotated[int, Field(ge=1, le=65_535)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


class Threshold(SparseSpec):
    """Probabilities above about `tau` as they are; the others sampled, each sampled one worth about `tau`."""

    name: Literal["threshold"] = "threshold"
    tau: Annotated[float, Field(ge=2**-15, le=1, allow_inf_nan=False)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]


SparseCodec = TopK | Sample | Threshold
