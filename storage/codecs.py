"""The sparse codecs: everything that is special about each, in its class.

A codec's class has the settings that a cache's spec names, the columns of its shards, and how entries become
these columns and come back. The encoder that makes the entries is in pipeline/codecs/encoders.py.

    layout   columns hold
    plain    ids and log-probabilities, for any tool that reads Parquet
    compact  gaps between ranks and small codes (storage/compact.py); about half the bytes

docs/cache-format.md defines every column. A new codec is a class here (in `SparseCodec`), an entry of
pipeline.codecs.encoders.ENCODERS and a section in pipeline/config/caches.py. No other file names a codec.

Shape letters: P positions, E entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from storage import compact
from storage.compact import Columns, Counts, Ranks
from storage.entries import Entries, ends, ranges
from storage.fields import Seed
from storage.fingerprints import Sha256, Strict

NumEntries = Annotated[int, Field(ge=1, le=65_535)]  # of a position; counts are uint16
Tau = Annotated[float, Field(ge=2**-15, le=1, allow_inf_nan=False)]  # probability
Noise = npt.NDArray[np.float64]


class Column(NamedTuple):
    """A column of a sparse shard: for each row a list of numbers."""

    kind: pa.DataType
    counted_by: str | None = None  # the column with a position's number of elements; None: one element each


PLAIN = {
    "num_entries": Column(pa.uint16()),
    "ids": Column(pa.int32(), "num_entries"),
    "log_probs": Column(pa.float32(), "num_entries"),
}


class SparseSpec(Strict, ABC):
    """Settings of all sparse codecs, and what each of them defines."""

    layout: Literal["plain", "compact"]
    ranks: Sha256 | None = None  # of a compact layout: the fingerprint of the manifest's `ranks`

    sampled: ClassVar[bool]  # entries are random draws, whose weights are unbiased for the probabilities
    tempered: ClassVar[bool]  # a loss may raise the weights to another temperature than 1
    plain_columns: ClassVar[Mapping[str, Column]]
    compact_columns: ClassVar[Mapping[str, Column]]

    @property
    def columns(self) -> Mapping[str, Column]:
        """The columns of a shard, in their order."""
        return self.compact_columns if self.layout == "compact" else self.plain_columns

    @property
    def position_column(self) -> str:
        """A column with one element a position."""
        return next(name for name, column in self.columns.items() if column.counted_by is None)

    @property
    def num_largest(self) -> int | None:
        """Of a position, how many of the largest log-probabilities its entries need; None: of all ids."""
        return None

    @property
    def noise_seed(self) -> int | None:
        """The seed of the random numbers that `pack` rounds with; None for a codec that needs none."""
        return None

    def pack(self, entries: Entries, ranks: Ranks | None = None, noise: Noise | None = None) -> Columns:
        """The columns of these entries, flat: the elements of all positions, one after the other.

        The compact layout numbers ids by `ranks`. `noise`, where `noise_seed` is not None: a uniform number
        in [0, 1) for each exact entry, in order. It rounds a share up or down without bias.
        """
        if self.layout == "plain":
            return self._pack_plain(entries)
        assert ranks is not None
        return self._pack_compact(entries, ranks, noise)

    def unpack(self, columns: Columns, ranks: Ranks) -> Entries:
        """The entries that `pack` was given: ids to the bit, weights to the layout's error."""
        return self._unpack_plain(columns) if self.layout == "plain" else self._unpack_compact(columns, ranks)

    def _pack_plain(self, entries: Entries) -> Columns:
        with np.errstate(divide="ignore"):
            log_probs = np.log(entries.weights)
        values: dict[str, npt.NDArray[Any]] = {
            "num_entries": entries.counts.astype(np.uint16),
            "num_exact": entries.num_exact.astype(np.uint16),
            "ids": entries.ids,
            "log_probs": log_probs,
            "log_tail": entries.log_tail,
        }
        return {name: values[name] for name in self.plain_columns}

    def _unpack_plain(self, columns: Columns) -> Entries:
        counts = columns["num_entries"].astype(np.int64)
        log_tail = np.array(columns["log_tail"]) if "log_tail" in columns else _no_tail(counts)
        num_exact = self._num_exact(columns, counts).astype(np.int32)
        return Entries(ends(counts), columns["ids"], np.exp(columns["log_probs"]), num_exact, log_tail)

    @abstractmethod
    def _num_exact(self, columns: Columns, counts_P: Counts) -> npt.NDArray[Any]: ...

    @abstractmethod
    def _pack_compact(self, entries: Entries, ranks: Ranks, noise: Noise | None) -> Columns: ...

    @abstractmethod
    def _unpack_compact(self, columns: Columns, ranks: Ranks) -> Entries: ...


class TopK(SparseSpec):
    """The `k` largest probabilities, and the log mass of all others."""

    name: Literal["topk"] = "topk"
    k: NumEntries

    sampled: ClassVar[bool] = False
    tempered: ClassVar[bool] = True
    plain_columns: ClassVar[Mapping[str, Column]] = {**PLAIN, "log_tail": Column(pa.float32())}
    compact_columns: ClassVar[Mapping[str, Column]] = {
        "num_ids": Column(pa.uint16()),
        "gaps": Column(pa.uint32(), "num_ids"),
        "codes": Column(pa.uint8(), "num_ids"),
        "tail_code": Column(pa.uint16()),
    }

    @property
    def num_largest(self) -> int:
        """See SparseSpec."""
        return self.k

    def _num_exact(self, columns: Columns, counts_P: Counts) -> npt.NDArray[Any]:
        return counts_P

    def _pack_compact(self, entries: Entries, ranks: Ranks, noise: Noise | None) -> Columns:
        gaps, order = compact.gaps_of(ranks.rank(entries.ids), entries.counts)
        return {
            "num_ids": entries.counts.astype(np.uint16),
            "gaps": gaps,
            "codes": compact.root_codes(entries.weights[order].astype(np.float64)),
            "tail_code": compact.tail_codes(entries.log_tail),
        }

    def _unpack_compact(self, columns: Columns, ranks: Ranks) -> Entries:
        counts = columns["num_ids"].astype(np.int64)
        offsets = ends(counts)
        ids = ranks.id(compact.ranks_of(columns["gaps"], offsets))
        tail = compact.tail_masses(columns["tail_code"])
        weights = compact.rescaled(compact.root_masses(columns["codes"]), counts, 1 - tail)
        with np.errstate(divide="ignore"):
            log_tail = np.log(tail).astype(np.float32)
        return Entries(offsets, ids, weights, counts.astype(np.int32), log_tail)


class Sample(SparseSpec):
    """`draws` draws with replacement, as counts (random sampling KD: Anshumann et al., ACL 2025)."""

    name: Literal["sample"] = "sample"
    draws: NumEntries
    seed: Seed

    sampled: ClassVar[bool] = True
    tempered: ClassVar[bool] = False
    plain_columns: ClassVar[Mapping[str, Column]] = PLAIN
    compact_columns: ClassVar[Mapping[str, Column]] = {
        "num_ids": Column(pa.uint16()),
        "gaps": Column(pa.uint32(), "num_ids"),
        "draws": Column(pa.uint16(), "num_ids"),
    }

    def _num_exact(self, columns: Columns, counts_P: Counts) -> npt.NDArray[Any]:
        return np.zeros_like(counts_P)

    def _pack_compact(self, entries: Entries, ranks: Ranks, noise: Noise | None) -> Columns:
        gaps, order = compact.gaps_of(ranks.rank(entries.ids), entries.counts)
        draws = np.rint(entries.weights[order].astype(np.float64) * self.draws)
        return {
            "num_ids": entries.counts.astype(np.uint16),
            "gaps": gaps,
            "draws": draws.astype(np.uint16),
        }

    def _unpack_compact(self, columns: Columns, ranks: Ranks) -> Entries:
        counts = columns["num_ids"].astype(np.int64)
        offsets = ends(counts)
        ids = ranks.id(compact.ranks_of(columns["gaps"], offsets))
        weights = columns["draws"].astype(np.float32) / np.float32(self.draws)
        return Entries(offsets, ids, weights, np.zeros(len(counts), np.int32), _no_tail(counts))


class Threshold(SparseSpec):
    """Probabilities above about `tau` as they are; the others sampled, each sampled one worth about `tau`."""

    name: Literal["threshold"] = "threshold"
    tau: Tau
    seed: Seed

    sampled: ClassVar[bool] = True
    tempered: ClassVar[bool] = False
    plain_columns: ClassVar[Mapping[str, Column]] = {**PLAIN, "num_exact": Column(pa.uint16())}
    compact_columns: ClassVar[Mapping[str, Column]] = {
        "num_head": Column(pa.uint16()),
        "num_tail": Column(pa.uint16()),
        "head_gaps": Column(pa.uint32(), "num_head"),
        "head_codes": Column(pa.uint8(), "num_head"),
        "tail_gaps": Column(pa.uint32(), "num_tail"),
    }

    @property
    def noise_seed(self) -> int | None:
        """The codec's own seed: head codes are rounded at random."""
        return self.seed

    def _num_exact(self, columns: Columns, counts_P: Counts) -> npt.NDArray[Any]:
        return columns["num_exact"]

    def _pack_compact(self, entries: Entries, ranks: Ranks, noise: Noise | None) -> Columns:
        assert noise is not None
        num_head = entries.num_exact.astype(np.int64)
        num_tail = entries.counts - num_head
        exact = np.arange(len(entries.ids)) < np.repeat(entries.offsets[:-1] + num_head, entries.counts)
        head_gaps, order = compact.gaps_of(ranks.rank(entries.ids[exact]), num_head)
        tail_gaps, _ = compact.gaps_of(ranks.rank(entries.ids[~exact]), num_tail)
        codes = compact.share_codes(entries.weights[exact][order].astype(np.float64), num_head, noise)
        last = (num_tail == 0) & (num_head > 0)  # nothing is left for a tail: the last share is all the rest
        codes[ends(num_head)[1:][last] - 1] = compact.HEAD_LEVELS
        return {
            "num_head": num_head.astype(np.uint16),
            "num_tail": num_tail.astype(np.uint16),
            "head_gaps": head_gaps,
            "head_codes": codes,
            "tail_gaps": tail_gaps,
        }

    def _unpack_compact(self, columns: Columns, ranks: Ranks) -> Entries:
        num_head, num_tail = columns["num_head"].astype(np.int64), columns["num_tail"].astype(np.int64)
        head_ends, tail_ends = ends(num_head), ends(num_tail)
        offsets = head_ends + tail_ends
        head, left = compact.head_masses(columns["head_codes"], num_head)
        ids = np.empty(offsets[-1], np.int32)
        weights = np.empty(offsets[-1], np.float32)
        at_head, at_tail = ranges(offsets[:-1], num_head), ranges(offsets[:-1] + num_head, num_tail)
        ids[at_head] = ranks.id(compact.ranks_of(columns["head_gaps"], head_ends))
        ids[at_tail] = ranks.id(compact.ranks_of(columns["tail_gaps"], tail_ends))
        weights[at_head] = head
        weights[at_tail] = np.repeat(left / np.maximum(num_tail, 1), num_tail)
        return Entries(offsets, ids, weights, num_head.astype(np.int32), _no_tail(num_head))


SparseCodec = TopK | Sample | Threshold
Codec = Literal["dense"] | SparseCodec


def _no_tail(counts_P: Counts) -> npt.NDArray[np.float32]:
    """The log tail of positions whose entries sum to 1."""
    return np.full(len(counts_P), -np.inf, np.float32)
