"""Random numbers of a row: a pure function of (seed, row_id, position, draw).

A row has the same numbers in any batch, order and process. The generator is Philox4x32-10 (Salmon, Moraes,
Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011), implemented here because numpy's own Philox
computes one counter at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]  # 32-bit words in 64 bits, so that products do not overflow

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Four random 32-bit words for every counter of four words; `key` has 64 bits, low word first."""
    a, b, c, d = counter
    low, high = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        left, right = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b, c, d = (
            (right >> SHIFT) ^ b ^ np.uint64(low),
            right & LOW,
            (left >> SHIFT) ^ d ^ np.uint64(high),
            left & LOW,
        )
        low, high = (low + WEYL[0]) & 0xFFFFFFFF, (high + WEYL[1]) & 0xFFFFFFFF
    return a, b, c, d


def row_words(row_ids: Sequence[str]) -> Words:
    """The first 64 bits of each row id, as two words: [N, 2]."""
    raw = b"".join(bytes.fromhex(row[:16]) for row in row_ids)
    return np.frombuffer(raw, ">u4").reshape(-1, 2).astype(np.uint64)


def uniforms(
    seed: int, rows_P2: Words, positions_P: npt.NDArray[np.int64], num_draws: int, stream: int = 0
) -> npt.NDArray[np.float64]:
    """[P, num_draws] numbers of 53 bits in [0, 1). Draw i of a position does not depend on `num_draws`;
    streams 0 to 255 are independent.
    """
    calls = -(-num_draws // 2)  # each gives four words, two numbers
    shape = (len(rows_P2), calls)
    call = np.broadcast_to(np.arange(calls, dtype=np.uint64) + np.uint64(stream << 24), shape)
    counter = tuple(
        np.broadcast_to(word[:, None], shape)
        for word in (rows_P2[:, 0], rows_P2[:, 1], positions_P.astype(np.uint64))
    )
    words = philox((*counter, call), seed)  # type: ignore[arg-type]
    pairs = [_unit(words[0], words[1]), _unit(words[2], words[3])]
    return np.stack(pairs, axis=-1).reshape(len(rows_P2), 2 * calls)[:, :num_draws]


def _unit(high: Words, low: Words) -> npt.NDArray[np.float64]:
    bits = (high >> np.uint64(5)) * np.uint64(2**26) + (low >> np.uint64(6))
    return bits.astype(np.float64) * 2.0**-53


I64 = npt.NDArray[np.int64]


class Keys(NamedTuple):
    """The keys of the random numbers of P positions."""

    rows: Words  # P x 2, row_words of each position's row
    positions: I64  # P, in its row

    def part(self, start: int, end: int) -> "Keys":
        """Positions start to end."""
        return Keys(self.rows[start:end], self.positions[start:end])
