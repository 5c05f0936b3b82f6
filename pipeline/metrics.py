"""What a classifier is worth: quality, agreement with its teacher, calibration, size, latency.

Shape letters: N rows, C classes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline import hardware
from pipeline.inputs import Inputs

ECE_BINS = 15
LATENCY_WARMUP, LATENCY_REPEATS = 3, 25
LATENCY_SECONDS, LATENCY_LEAST = 1.5, 3  # slow models are called less often

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]


def quality(logits_NC: Logits, labels_N: Labels) -> dict[str, float | None]:
    """Accuracy, ROC AUC (one against the rest, macro; None where a class is absent), macro F1, ECE. All in
    [0, 1].
    """
    from sklearn.metrics import (
        accuracy_score,
        f1_score,
        roc_auc_score,
    )  # a second to import; few stages need it

    probability_NC = np.exp(_log_softmax(logits_NC))
    said_N = logits_NC.argmax(1)
    classes = np.arange(logits_NC.shape[1])
    auc = None
    if set(labels_N) == set(classes):
        scores = probability_NC[:, 1] if len(classes) == 2 else probability_NC
        auc = float(roc_auc_score(labels_N, scores, multi_class="ovr", labels=classes))
    return {
        "accuracy": float(accuracy_score(labels_N, said_N)),
        "roc_auc": auc,
        "macro_f1": float(f1_score(labels_N, said_N, average="macro", labels=classes, zero_division=0)),
        "ece": calibration_error(probability_NC, labels_N),
    }


def calibration_error(probability_NC: npt.NDArray[np.floating[Any]], labels_N: Labels) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence| over 15 bins of confidence."""
    return binned_error(probability_NC.max(1), probability_NC.argmax(1) == labels_N)


def binned_error(confidence_N: npt.NDArray[np.floating[Any]], right_N: npt.NDArray[np.bool_]) -> float:
    """The same from how sure each first choice was, and whether it was right."""
    bin_N = np.minimum((confidence_N * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = [abs(float((right_N[bin_N == b] - confidence_N[bin_N == b]).sum())) for b in range(ECE_BINS)]
    return sum(gaps) / len(right_N)


def against_teacher(logits_NC: Logits, teacher_NC: Logits, labels_N: Labels) -> dict[str, float]:
    """Agreement of classes, KL(teacher || student) in nats, and who is right where, as shares."""
    student, teacher = _log_softmax(logits_NC), _log_softmax(teacher_NC)
    right, teacher_right = logits_NC.argmax(1) == labels_N, teacher_NC.argmax(1) == labels_N
    return {
        "agreement": float((logits_NC.argmax(1) == teacher_NC.argmax(1)).mean()),
        "kl_to_teacher": float((np.exp(teacher) * (teacher - student)).sum(1).mean()),
        "both_right": float((right & teacher_right).mean()),
        "only_teacher_right": float((~right & teacher_right).mean()),
        "only_student_right": float((right & ~teacher_right).mean()),
        "both_wrong": float((~right & ~teacher_right).mean()),
    }


def latency(
    answer: Callable[[torch.Tensor, torch.Tensor], object],
    tokens: Inputs,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    size: int,
) -> float:
    """Median milliseconds of one call on `size` rows, tokens to logits, on one thread; always other rows."""
    return latencies({"": answer}, tokens, rows, pad_id, size)[""]


def latencies(
    ways: Mapping[str, Callable[[torch.Tensor, torch.Tensor], object]],
    tokens: Inputs,
    rows: npt.NDArray[np.int64],
    pad_id: int,
    size: int,
) -> dict[str, float]:
    """The same of several ways to answer, which take turns: a slow moment of the machine hits all alike."""
    picked = np.resize(rows, (LATENCY_WARMUP + LATENCY_REPEATS) * size).reshape(-1, size)
    times: dict[str, list[float]] = {name: [] for name in ways}
    threads = torch.get_num_threads()
    hardware.pin_threads(1)
    try:
        with torch.inference_mode():
            for calls, batch in enumerate(picked, 1):
                ids, mask = (torch.from_numpy(array) for array in tokens.padded(batch, pad_id))
                for name, answer in ways.items():
                    started = time.perf_counter()
                    answer(ids, mask)
                    times[name].append(time.perf_counter() - started)
                spent = sum(map(sum, times.values())) / len(ways)
                if spent > LATENCY_SECONDS and calls >= LATENCY_WARMUP + LATENCY_LEAST:
                    break
    finally:
        hardware.pin_threads(threads)
    return {name: 1000 * float(np.median(found[LATENCY_WARMUP:])) for name, found in times.items()}


def over_seeds(values: Sequence[dict[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Each metric as {"mean", "std", "values"} over seeds; std is that of a sample, None for one seed."""
    merged = {}
    for name in values[0]:
        column = [value[name] for value in values]
        known = [v for v in column if v is not None]
        whole = len(known) == len(column)
        merged[name] = {
            "mean": float(np.mean(known)) if whole else None,
            "std": float(np.std(known, ddof=1)) if whole and len(known) > 1 else None,
            "values": column,
        }
    return merged


def _log_softmax(logits_NC: Logits) -> npt.NDArray[np.float64]:
    wide: npt.NDArray[np.float64] = logits_NC.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide
