"""The dense oracle: positions with all their probabilities, and what each codec must do, computed in float64.

Real teachers' distributions are peaked and heavy-tailed; these are too. The checks are written against the
definitions in ALGORITHMS-style formulas, never against the code under test.
"""

import numpy as np
import numpy.typing as npt
import torch

from pipeline.codecs.sparsify import sparsify
from pipeline.data.counter_rng import Keys, row_words
from storage.codecs import SparseCodec
from storage.entries import Entries

F64 = npt.NDArray[np.float64]


def logits(num: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Logits [num, vocab] like a language model's: Zipf's law, reshuffled, sharpened more or less."""
    generator = np.random.default_rng(seed)
    zipf = -np.log(np.arange(1, vocab + 1))
    rows = [
        generator.uniform(0.5, 4) * generator.permutation(zipf) + generator.normal(0, 0.5, vocab)
        for _ in range(num)
    ]
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def probabilities(logits_PV: torch.Tensor) -> F64:
    """softmax in float64 [P, V]."""
    found: F64 = torch.softmax(logits_PV.double(), -1).numpy()
    return found


def keys(num: int, row: int = 0) -> Keys:
    """The names of `num` positions of one row."""
    return Keys(np.repeat(row_words([row_name(row)]), num, axis=0), np.arange(num))


def encoded(logits_PV: torch.Tensor, codec: SparseCodec, row: int = 0) -> Entries:
    """The entries of these positions, as if they were row number `row`."""
    return sparsify(logits_PV, codec, keys(len(logits_PV), row))


def dense(entries: Entries, vocab: int) -> F64:
    """The entries' weights [P, V], zeros elsewhere."""
    made = np.zeros((len(entries.counts), vocab))
    np.add.at(made, (entries.positions, entries.ids), entries.weights.astype(np.float64))
    return made


def four_standard_errors(weights_RV: F64, target_V: F64) -> float:
    """How far means over R draws are from the target, in units of four standard errors: below 1 is unbiased.

    Looked at are the ids with 30 draws or more, and groups of ids of like probability (1, 2, 4, 8, ... by
    rank), in which a small bias of many ids adds up.
    """
    order = np.argsort(-target_V)
    ranked, wanted = weights_RV[:, order], target_V[order]
    edges = [2**i - 1 for i in range(int(np.log2(len(wanted))) + 1)]
    grouped = np.add.reduceat(ranked, edges, axis=1), np.add.reduceat(wanted, edges)
    often = (ranked > 0).sum(axis=0) >= 30
    worst = 0.0
    for draws, means in (grouped, (ranked[:, often], wanted[often])):
        error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws)) + 1e-7  # float32 weights
        worst = max(worst, float((np.abs(draws.mean(axis=0) - means) / (4 * error)).max(initial=0)))
    return worst


def row_name(number: int) -> str:
    """A row id of its own for each number."""
    return f"{number:016x}".ljust(32, "0")
