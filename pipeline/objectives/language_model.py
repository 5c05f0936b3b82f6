"""Language models: their scores on held-out documents, and how these compare with the teacher.

Shape letters: B batch, L tokens, T targets, D width, V vocabulary.
"""

import math
import time
from collections.abc import Iterable
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from pipeline.losses.fused_linear import head_loss, mix_labels
from pipeline.losses.sparse import SparseTargets, bucket_kl
from pipeline.objectives.base import Validation, Values, binned_error, mix
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import call_model

CHUNK_TOKENS = 128  # whose logits are in memory at a time
LARGEST_LOSS = 700.0  # a perplexity of a larger one overflows
BY_LOSS = True  # the best state is that of the lowest loss: see Objective.by_loss


class LanguageModelScores(NamedTuple):
    """Scores on documents, as means over their targets."""

    loss: float  # of the next token, nats
    accuracy: float  # share of next tokens that are the first choice
    ece: float  # expected calibration error of the first choice
    agreement: float | None  # share of first choices that are the teacher's, where entries have one largest
    kl_to_teacher: float | None  # nats; of top-k entries that of kept ids and one bucket: a lower bound
    tokens_per_second: float

    @property
    def validation(self) -> Validation:
        """The scores of a validation split."""
        return Validation(self.accuracy, self.loss)

    @property
    def metrics(self) -> Values:
        """The scores as metrics of the results. A teacher has no distance to itself."""
        return {
            "perplexity": math.exp(min(self.loss, LARGEST_LOSS)),
            "lm_loss": self.loss,
            "accuracy": self.accuracy,
            "agreement": self.agreement,
            "kl_to_teacher": self.kl_to_teacher,
            "ece": self.ece,
            "tokens_per_second": self.tokens_per_second,
        }


class TeacherReference(NamedTuple):
    """The teacher that a student is compared with."""

    sampled: bool  # whether its entries are of a sampling codec
    entropy: float  # mean over the targets, nats


class HeadInputs(NamedTuple):
    """What a head makes logits of: states @ head^T + bias."""

    states_TD: torch.Tensor
    head_VD: torch.Tensor
    bias_V: torch.Tensor | None = None

    def autocast(self) -> "HeadInputs":
        """In bfloat16 under autocast: the fused loss computes in the dtype that it is given."""
        if not torch.is_autocast_enabled(self.states_TD.device.type):
            return self
        bias = None if self.bias_V is None else self.bias_V.bfloat16()
        return HeadInputs(self.states_TD.bfloat16(), self.head_VD.bfloat16(), bias)


def fused_loss(
    inputs: HeadInputs, labels_T: torch.Tensor, targets: SparseTargets, alpha: float, sampled: bool
) -> torch.Tensor:
    """alpha CE + (1 - alpha) soft, in nats, mean over tokens, each of which has a label.

    soft is sum w log(1 / p) on sampled entries, and with a bucket for the rest on top-k: the KL up to a
    constant of the targets. The matrix of logits is never whole (losses/fused_linear.py).
    """
    states_TD, head_VD, bias_V = inputs.autocast()
    if sampled:  # labels are entries too: one pass over the head
        loss = head_loss(states_TD, head_VD, mix_labels(labels_T, targets, alpha), bias_V)
    else:
        loss = mix(
            alpha,
            lambda: head_loss(states_TD, head_VD, mix_labels(labels_T, targets, 1.0), bias_V),
            lambda: head_loss(states_TD, head_VD, targets, bias_V, bucket=True),
        )
    return loss / len(states_TD)


@torch.inference_mode()
def score_documents(
    model: torch.nn.Module, batches: Iterable[DistillBatch], teacher: TeacherReference | None = None
) -> LanguageModelScores:
    """Scores of a student on all batches, compared with the teacher's entries where `teacher` is given.

    From sampled entries the KL is their cross-entropy, which is unbiased, minus the teacher's entropy.
    """
    head_VD, device = cast(torch.Tensor, model.head), next(model.parameters()).device
    loss = kl = seconds = 0.0
    targets = known_targets = agreed = 0
    confident: list[npt.NDArray[np.float32]] = []
    right: list[npt.NDArray[np.bool_]] = []
    for batch in batches:
        batch = batch.to(device)
        started = time.perf_counter()
        states_TD = call_model(model, batch.inputs)[batch.mask]
        for start in range(0, len(states_TD), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            log_probs_TV = (states_TD[part] @ head_VD.T).float().log_softmax(-1)
            best = log_probs_TV.max(-1)
            seconds += time.perf_counter() - started
            labels_T = batch.labels_T[part]
            loss -= log_probs_TV.gather(1, labels_T[:, None]).sum().item()
            confident.append(best.values.exp().cpu().numpy())
            right.append((best.indices == labels_T).cpu().numpy())
            if teacher is not None:
                assert isinstance(batch.teacher, SparseTargets)
                entries = _part(batch.teacher, start, start + len(log_probs_TV))
                for term in _kl_terms(log_probs_TV, entries, teacher):
                    kl += term
                known, choice = _first_choice(entries)
                known_targets += int(known.sum())
                agreed += int((known & (choice == best.indices)).sum())
            started = time.perf_counter()
        targets += len(states_TD)
    confidence, correct = np.concatenate(confident), np.concatenate(right)
    return LanguageModelScores(
        loss / targets, float(correct.mean()), binned_error(confidence, correct),
        agreed / known_targets if known_targets else None, kl / targets if teacher else None,
        targets / seconds,
    )  # fmt: skip


def _kl_terms(
    log_probs_TV: torch.Tensor, entries: SparseTargets, teacher: TeacherReference
) -> tuple[float, ...]:
    """Terms whose sum is the KL to the teacher in nats, summed over positions."""
    num = len(log_probs_TV)
    if not teacher.sampled:
        return (bucket_kl(log_probs_TV, entries).item() * num,)
    cross_entropy = -(entries.weights * log_probs_TV[entries.positions, entries.ids]).sum().item()
    return cross_entropy, -teacher.entropy * num


def _part(targets: SparseTargets, start: int, stop: int) -> SparseTargets:
    """The entries of positions start to stop, numbered from 0."""
    ends = torch.searchsorted(targets.positions, torch.tensor([start, stop], device=targets.positions.device))
    own = slice(int(ends[0]), int(ends[1]))
    return SparseTargets(
        targets.positions[own] - start, targets.ids[own], targets.weights[own], targets.log_tail[start:stop]
    )


def _first_choice(targets: SparseTargets) -> tuple[torch.Tensor, torch.Tensor]:
    """(where one entry is the largest [T], its id [T]). Positions with ties or without entries have none."""
    num = len(targets.log_tail)
    largest = targets.weights.new_zeros(num).scatter_reduce(0, targets.positions, targets.weights, "amax")
    is_largest = targets.weights == largest[targets.positions]
    times = torch.bincount(targets.positions[is_largest], minlength=num)
    choice = torch.zeros(num, dtype=torch.int64, device=targets.ids.device)
    choice[targets.positions[is_largest]] = targets.ids[is_largest]
    return times == 1, choice
