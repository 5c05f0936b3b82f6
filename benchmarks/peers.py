"""Peers' layouts for sparse targets, re-implemented from their published descriptions, for comparison only.

Each has `write(path, top, vocab)` over the k largest log-probabilities [P, k] and ids [P, k] (or counts), and
`read(path)`, which returns tensors as that system's collate function does. Sources:
    DistillKit       README, "Recommended configuration": ids at ceil(log2 V) bits, 16 values in bfloat16 and
                     a polynomial of six float32 terms for the rest ("exact": every value in bfloat16), packed
                     into byte vectors; Parquet of lists of bytes, through Python lists to tensors
    Megatron-LM      pull request 5019: ids in 16 bits and a high bit, values in bfloat16, torch.save, zstd
    RS-KD            Anshumann et al. 2025: 17 bits of id and 7 of count in 24
    JSON lines       the format of EasyDistill and NeMo-Aligner: token id and log-probability as text
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

EXACT, TERMS = 16, 6
ROWS_OF = 256  # positions a row, as in Stillroom's file


class Top(NamedTuple):
    """The k largest of P positions, largest first."""

    ids_PK: npt.NDArray[np.int64]
    log_probs_PK: npt.NDArray[np.float32]
    vocab: int


def distillkit_write(path: Path, top: Top, exact: int | None = None) -> None:
    """Writes `exact` values in bfloat16 (None: all), the rest by a polynomial of the rank."""
    k = top.ids_PK.shape[1]
    exact = k if exact is None else min(exact, k)
    parts = [_pack(top.ids_PK, _bits(top.vocab)), _bfloat16_bytes(top.log_probs_PK[:, :exact])]
    if exact < k:
        terms_KT = _terms(k)[exact:]
        fit = np.linalg.lstsq(terms_KT, top.log_probs_PK[:, exact:].T.astype(np.float64), rcond=None)[0]
        parts.append(np.ascontiguousarray(fit.T.astype(np.float32)).view(np.uint8))
    packed = np.concatenate(parts, axis=1)
    rows = packed.reshape(-1, ROWS_OF, packed.shape[1])
    lists = pa.array(
        [[list(position) for position in row] for row in rows.tolist()], pa.list_(pa.list_(pa.uint8()))
    )
    pq.write_table(pa.table({"compressed_logprobs": lists}), path)


def distillkit_read(
    path: Path, k: int, vocab: int, exact: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads as its data loader does: Python lists of bytes become a tensor, then bits are unpacked."""
    rows = pq.read_table(path, use_threads=False).column(0).to_pylist()
    packed = torch.tensor(rows, dtype=torch.uint8).flatten(0, 1).numpy()
    exact = k if exact is None else min(exact, k)
    bits = _bits(vocab)
    width = -(-bits * k // 8)
    ids = _unpack(packed[:, :width], bits, k)
    values = torch.from_numpy(packed[:, width : width + 2 * exact].copy()).view(torch.bfloat16).float()
    if exact < k:
        fit = packed[:, width + 2 * exact :].copy().view(np.float32)
        rest = torch.from_numpy(fit.astype(np.float64) @ _terms(k)[exact:].T).float()
        values = torch.cat([values, rest], 1)
    return torch.from_numpy(ids), values


def megatron_write(path: Path, top: Top) -> None:
    """ids in 16 bits with a packed high bit, values in bfloat16; torch.save inside zstd."""
    low = torch.from_numpy((top.ids_PK & 0xFFFF).astype(np.uint16))
    high = torch.from_numpy(np.packbits((top.ids_PK >> 16).astype(bool), axis=1))
    buffer = io.BytesIO()
    values = torch.from_numpy(top.log_probs_PK).bfloat16()
    torch.save({"low": low, "high": high, "values": values}, buffer)
    path.write_bytes(pa.Codec("zstd").compress(buffer.getvalue(), asbytes=True))
    path.with_suffix(".size").write_text(str(len(buffer.getvalue())))


def megatron_read(path: Path, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `megatron_write`."""
    size = int(path.with_suffix(".size").read_text())
    raw = pa.Codec("zstd").decompress(path.read_bytes(), size, asbytes=True)
    held: dict[str, Any] = torch.load(io.BytesIO(raw), weights_only=True)
    high = np.unpackbits(held["high"].numpy(), axis=1, count=k).astype(np.int64)
    ids = held["low"].numpy().astype(np.int64) | high << 16
    return torch.from_numpy(ids), held["values"].float()


def rskd_write(path: Path, ids: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], sizes: Any) -> None:
    """Writes 24 bits an entry, and a byte a position with the number of its entries."""
    words = (ids << 7 | np.minimum(counts, 127)).astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3]
    path.write_bytes(np.uint32(len(sizes)).tobytes() + sizes.astype(np.uint8).tobytes() + words.tobytes())


def rskd_read(path: Path, draws: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, weights, entries a position)."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    num = int(raw[:4].view(np.uint32)[0])
    words = raw[4 + num :].reshape(-1, 3).astype(np.int64)
    value = words[:, 0] | words[:, 1] << 8 | words[:, 2] << 16
    return (
        torch.from_numpy(value >> 7),
        torch.from_numpy((value & 127) / draws),
        torch.from_numpy(raw[4 : 4 + num]),
    )


def lines_write(path: Path, top: Top) -> None:
    """One JSON list of [id, log-probability] pairs a position."""
    with path.open("w") as file:
        for ids, values in zip(top.ids_PK.tolist(), top.log_probs_PK.tolist(), strict=True):
            file.write(json.dumps(list(zip(ids, values, strict=True))) + "\n")


def lines_read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, values) of all lines."""
    with path.open() as file:
        pairs = torch.tensor([json.loads(line) for line in file], dtype=torch.float64)
    return pairs[..., 0].long(), pairs[..., 1].float()


def _bits(vocab: int) -> int:
    return int(np.ceil(np.log2(vocab)))


def _terms(k: int) -> npt.NDArray[np.float64]:
    at = np.arange(k) / k
    return np.stack([*(at**power for power in range(TERMS - 1)), np.sqrt(at)], axis=1)


def _bfloat16_bytes(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    packed = torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint8)
    found: npt.NDArray[np.uint8] = packed.reshape(len(values), -1).numpy()
    return found


def _pack(values_PK: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    planes = (values_PK[..., None] >> np.arange(bits)) & 1
    return np.packbits(planes.reshape(len(values_PK), -1).astype(np.uint8), axis=1, bitorder="little")


def _unpack(packed: npt.NDArray[np.uint8], bits: int, k: int) -> npt.NDArray[np.int64]:
    planes = np.unpackbits(packed, axis=1, count=bits * k, bitorder="little").reshape(len(packed), k, bits)
    found: npt.NDArray[np.int64] = planes.astype(np.int64) @ (1 << np.arange(bits))
    return found
