"""A language model student on documents that it has not seen: how well it reads, and how it goes on.

Shape letters: B batch, L tokens, T targets, D width, V vocabulary.
"""

import time
from collections.abc import Iterable
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from pipeline.losses.sparse import SparseTargets, bucket_kl
from pipeline.objectives.base import binned_error
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import call_model

CHUNK_TOKENS = 128  # whose logits are there at a time


class LanguageModelScores(NamedTuple):
    """What a student makes of held-out documents, as means over their targets."""

    loss: float  # of the next token, nats
    accuracy: float  # share of next tokens that are the first choice
    ece: float  # expected calibration error of the first choice
    agreement: float | None  # share of first choices that are the teacher's, where the entries tell that one
    kl_to_teacher: float | None  # nats; of top-k entries that of kept ids and one bucket: a lower bound
    tokens_per_second: float


class TeacherReference(NamedTuple):
    """What a student is compared with."""

    sampled: bool  # whether its entries are of a sampling codec
    entropy: float  # mean over the targets, nats


@torch.inference_mode()
def score_documents(
    model: torch.nn.Module, batches: Iterable[DistillBatch], teacher: TeacherReference | None = None
) -> LanguageModelScores:
    """Read all batches, and compare with the teacher's entries where it is given.

    From sampled entries the KL is their cross-entropy, which is unbiased, less the teacher's entropy.
    """
    head_VD, device = cast(torch.Tensor, model.head), next(model.parameters()).device
    loss = kl = seconds = 0.0
    targets = told = agreed = 0
    sure: list[npt.NDArray[np.float32]] = []
    right: list[npt.NDArray[np.bool_]] = []
    for batch in batches:
        batch = batch.to(device)
        started = time.perf_counter()
        states_TD = call_model(model, batch.inputs)[batch.mask]
        for start in range(0, len(states_TD), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            said_TV = (states_TD[part] @ head_VD.T).float().log_softmax(-1)
            best = said_TV.max(-1)
            seconds += time.perf_counter() - started
            labels_T = batch.labels_T[part]
            loss -= said_TV.gather(1, labels_T[:, None]).sum().item()
            sure.append(best.values.exp().cpu().numpy())
            right.append((best.indices == labels_T).cpu().numpy())
            if teacher is not None:
                assert isinstance(batch.teacher, SparseTargets)
                entries = _part(batch.teacher, start, start + len(said_TV))
                if teacher.sampled:
                    kl -= (entries.weights * said_TV[entries.positions, entries.ids]).sum().item()
                    kl -= teacher.entropy * len(said_TV)
                else:
                    kl += bucket_kl(said_TV, entries).item() * len(said_TV)
                known, choice = _first_choice(entries)
                told += int(known.sum())
                agreed += int((known & (choice == best.indices)).sum())
            started = time.perf_counter()
        targets += len(states_TD)
    confidence, correct = np.concatenate(sure), np.concatenate(right)
    return LanguageModelScores(
        loss / targets, float(correct.mean()), binned_error(confidence, correct),
        agreed / told if told else None, kl / targets if teacher else None, targets / seconds,
    )  # fmt: skip


def _part(targets: SparseTargets, start: int, stop: int) -> SparseTargets:
    """The entries of positions start to stop, numbered from 0."""
    ends = torch.searchsorted(targets.positions, torch.tensor([start, stop], device=targets.positions.device))
    own = slice(int(ends[0]), int(ends[1]))
    return SparseTargets(
        targets.positions[own] - start, targets.ids[own], targets.weights[own], targets.log_tail[start:stop]
    )


def _first_choice(targets: SparseTargets) -> tuple[torch.Tensor, torch.Tensor]:
    """(where one entry is the largest [T], that entry's id [T]): ties, and no entry, tell no first choice."""
    num = len(targets.log_tail)
    largest = targets.weights.new_zeros(num).scatter_reduce(0, targets.positions, targets.weights, "amax")
    is_largest = targets.weights == largest[targets.positions]
    times = torch.bincount(targets.positions[is_largest], minlength=num)
    choice = torch.zeros(num, dtype=torch.int64, device=targets.ids.device)
    choice[targets.positions[is_largest]] = targets.ids[is_largest]
    return times == 1, choice
