"""Dense logits -> entries, in chunks of positions. docs/codecs.md explains how to choose a codec.

Every encoder makes one pass of exponentials over the logits and stores the sums of blocks of 256 ids. Block
sums locate large probabilities and draws, so that no encoder sorts or cumulates a whole vocabulary: it reads
a few blocks. Random numbers belong to the row and the position (pipeline/data/counter_rng.py), so the entries
of a position depend on its logits and its name alone.

Shape letters: P positions, V vocabulary, B blocks, K ids of a block, M draws of all positions.
"""

import numpy as np
import torch

from pipeline.codecs.encoders import ENCODERS
from pipeline.codecs.exponentials import BLOCK, F64, BlockSums
from pipeline.data.counter_rng import Keys
from storage.codecs import SparseCodec
from storage.entries import Entries, concatenate

CHUNK_BYTES = 8 * 2**20  # of exponentials in memory at a time


class NotFinite(ValueError):
    """A position has a logit that is NaN or infinite."""

    def __init__(self, position: int) -> None:
        super().__init__(f"the logits of position {position} are not finite")
        self.position = position


def sparsify(
    logits_PV: torch.Tensor, codec: SparseCodec, keys: Keys, vocab_size: int | None = None
) -> Entries:
    """The entries of every position: `codec` applied to softmax(logits) at temperature 1.

    As `sparsify_and_measure`, without the entropies.
    """
    return sparsify_and_measure(logits_PV, codec, keys, vocab_size)[0]


def sparsify_and_measure(
    logits_PV: torch.Tensor, codec: SparseCodec, keys: Keys, vocab_size: int | None = None
) -> tuple[Entries, F64]:
    """(the entries of every position, the entropy of each position's distribution [P], nats).

    Columns from `vocab_size` on are padding: they have no entries and no mass. Logits of any floating
    dtype on any device. Raises NotFinite for the first position with a NaN or an infinity.
    """
    logits_PV = logits_PV[:, :vocab_size]
    rows = max(1, CHUNK_BYTES // (4 * logits_PV.shape[1]))
    width = -(-logits_PV.shape[1] // BLOCK) * BLOCK
    room = torch.empty(
        min(rows, len(logits_PV)), width, device=logits_PV.device
    )  # reused: fresh pages are slow
    parts, entropies, encode = [], [np.zeros(0)], ENCODERS[type(codec)]
    for start in range(0, len(logits_PV), rows):
        part = keys.part(start, start + rows)
        blocks = BlockSums(logits_PV[start : start + rows], room)
        if not np.isfinite(blocks.mass).all():
            raise NotFinite(start + int(np.flatnonzero(~np.isfinite(blocks.mass))[0]))
        entropies.append(blocks.entropy)
        parts.append(encode(blocks, codec, part))
    return concatenate(parts), np.concatenate(entropies)
