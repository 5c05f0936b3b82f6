"""Students trained on cached targets against students of all logits: the same data, start and steps.

Arms: labels alone (ce); all of the teacher's logits, recomputed from its states at every step (full); the
twelve largest, renormalised, and with a bucket for the rest; 22 draws (12 ids); threshold, 12 and 7 entries.
The student is a Llama of 4 layers, 128 wide, whose embeddings start as the teacher's on their first 128
principal components. Every arm starts from the same weights for a seed and sees the same batches in the same
order. Held-out: loss of the next token, KL to the teacher (all logits), ECE. `--plot` draws docs/quality.svg.
Last line: JSON, means and spreads (standard deviations over seeds).

Trainings run on one thread each, in parallel; finished ones are kept in .stillroom/quality: remove it to
start again. It takes an hour and a half on two busy cores.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import numpy.typing as npt
import teacher_data
import torch

from pipeline.config.students import LlamaStudent
from pipeline.losses.fused_linear import head_loss
from pipeline.losses.sparse import SparseTargets
from pipeline.objectives.base import binned_error
from pipeline.runtime import hardware
from pipeline.students.llama import Llama
from pipeline.training.loop import learning_rate_factor
from storage import order
from storage.entries import Entries

ARMS = {  # arm -> the codec of its targets
    "ce": None,
    "full": None,
    "topk 12": "topk 12",
    "topk 12 bucket": "topk 12",
    "sample 12": "sample 12",
    "threshold 12": "threshold 12",
    "threshold 7": "threshold 7",
}
HELD_OUT = 64  # pieces
ENTRY = LlamaStudent(kind="llama", layers=4, width=128, heads=2, max_length=teacher_data.LENGTH)
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 0.05, 0.01
CHUNK = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=196_608)
    parser.add_argument("--rows", type=int, default=4, help="pieces of 128 tokens a step")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    pieces = HELD_OUT + options.positions // teacher_data.LENGTH
    teacher_data.make(pieces)
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(hardware.num_cores(), mp_context=context) as pool:
        trained = {
            (arm, seed): pool.submit(trained_alone, pieces, arm, seed, options.rows)
            for seed in range(options.seeds)
            for arm in ARMS
        }
        for (arm, seed), future in trained.items():
            found[arm].append(result := future.result())
            print(
                f"seed {seed}  {arm:15} " + "  ".join(f"{k} {v:.4f}" for k, v in result.items()), flush=True
            )
    hardware.pin_threads(1)
    known = teacher_data.load(pieces)
    seconds = step_seconds(known, options.rows)
    arms = {}
    for arm, results in found.items():
        codec = ARMS[arm]
        arms[arm] = {
            **{key: _spread([r[key] for r in results]) for key in results[0]},
            "bytes": known.bytes[codec] if codec else 4.0 if arm == "ce" else 4.0 * len(known.head_VD),
            "entries": float(known.entries[codec].counts.mean()) if codec else None,
            "s_per_step": seconds[arm],
        }
        print(
            f"{arm:15} lm loss {arms[arm]['lm_loss']['mean']:.4f} ± {arms[arm]['lm_loss']['std']:.4f}  "
            f"kl {arms[arm]['kl']['mean']:.4f} ± {arms[arm]['kl']['std']:.4f}  "
            f"ece {arms[arm]['ece']['mean']:.4f}  {arms[arm]['bytes']:.1f} B  {seconds[arm]:.2f} s a step"
        )
    teacher = known.teacher_seconds * options.rows * teacher_data.LENGTH
    print(f"the teacher's own forward pass, which `full` also needs at every step: {teacher:.2f} s a step")
    if options.plot:
        plot(arms, Path("docs/quality.svg"))
    common.print_result({"arms": arms, "positions": options.positions, "seeds": options.seeds,
                  "teacher_s_per_step": teacher})  # fmt: skip


def trained_alone(pieces: int, arm: str, seed: int, rows: int) -> dict[str, float]:
    """The result of one training, in a process of one thread; read from disk if it is finished."""
    hardware.pin_threads(1)
    name = f"{arm}-{seed}-{pieces}-{rows}"
    finished = teacher_data.remember(name)
    return finished or teacher_data.remember(name, train(teacher_data.load(pieces), arm, seed, rows))


def train(known: teacher_data.TeacherData, arm: str, seed: int, rows: int) -> dict[str, float]:
    """Trains one student once over all pieces, and measures it on the held-out ones."""
    student, step = prepared(known, arm, seed)
    pieces = HELD_OUT + order.permutation(len(known.tokens_NL) - HELD_OUT, seed)
    batches = list(teacher_data.steps(pieces, rows))
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: learning_rate_factor(at, len(batches), WARMUP)
    )
    for batch in batches:
        step(batch).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return measure(known, student)


def prepared(
    known: teacher_data.TeacherData, arm: str, seed: int
) -> tuple[Llama, Callable[[npt.NDArray[np.int64]], torch.Tensor]]:
    """(the student with its first weights, the loss of a batch of pieces)."""
    torch.manual_seed(seed)
    student = Llama(ENTRY, len(known.head_VD))
    with torch.no_grad():
        student.head.copy_(_principal(known.head_VD, ENTRY.width))
    codec = ARMS[arm]

    def loss(pieces: npt.NDArray[np.int64]) -> torch.Tensor:
        ids = torch.from_numpy(known.tokens_NL[pieces])
        states = student(ids)[:, :-1].flatten(0, 1)
        head = student.head
        if arm == "full":
            teacher_states = torch.from_numpy(known.states_NLD[pieces][:, :-1]).flatten(0, 1)
            return _Full.apply(states, head, teacher_states, known.head_VD) / len(states)
        if codec is None:
            targets = _labels(ids[:, 1:].flatten())
        else:
            places = (pieces[:, None] * teacher_data.LENGTH + np.arange(teacher_data.LENGTH - 1)).ravel()
            targets = _weights(known.entries[codec].take(places), arm)
        return head_loss(states, head, targets, chunk=CHUNK, bucket=arm.endswith("bucket")) / len(states)

    return student, loss


def _labels(labels_P: torch.Tensor) -> SparseTargets:
    num = len(labels_P)
    return SparseTargets(torch.arange(num), labels_P, torch.ones(num), torch.full((num,), -torch.inf))


def _weights(entries: Entries, arm: str) -> SparseTargets:
    targets = SparseTargets.of(entries)
    if arm != "topk 12":
        return targets
    mass = torch.zeros(len(targets.log_tail)).index_add(0, targets.positions, targets.weights)
    return targets._replace(weights=targets.weights / mass[targets.positions])


class _Full(torch.autograd.Function):
    """Cross-entropy to all of the teacher's probabilities, a chunk of positions at a time (see head_loss)."""

    @staticmethod
    def forward(
        ctx: Any,
        states_PD: torch.Tensor,
        head_VD: torch.Tensor,
        teacher_PT: torch.Tensor,
        teacher_VT: torch.Tensor,
    ) -> torch.Tensor:
        grad_states, grad_head, total = torch.empty_like(states_PD), torch.zeros_like(head_VD), 0.0
        for at in range(0, len(states_PD), CHUNK):
            part = slice(at, at + CHUNK)
            probs = torch.softmax(teacher_PT[part] @ teacher_VT.T, -1)
            logits = states_PD[part] @ head_VD.T
            sums = logits.logsumexp(1)
            total += float(sums.sum() - torch.vdot(probs.flatten(), logits.flatten()))
            grad = logits.sub_(sums[:, None]).exp_().sub_(probs)
            grad_states[part] = grad @ head_VD
            grad_head += grad.T @ states_PD[part]
        ctx.save_for_backward(grad_states, grad_head)
        return states_PD.new_tensor(total)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        states, head = ctx.saved_tensors
        return states * grads[0], head * grads[0], None, None


def _principal(weight_VD: torch.Tensor, width: int) -> torch.Tensor:
    """The rows on their first principal components, with a standard deviation of 0.03."""
    basis = torch.linalg.eigh(weight_VD.T @ weight_VD).eigenvectors.flip(1)[:, :width]
    found = weight_VD @ basis
    return found * (0.03 / found.std())


@torch.inference_mode()
def measure(known: teacher_data.TeacherData, student: Llama) -> dict[str, float]:
    """Loss of the next token, KL(teacher || student) over all ids, ECE, over the held-out pieces."""
    loss = kl = positions = 0.0
    confidences, hits = [], []
    for start in range(0, HELD_OUT, 2):
        ids = torch.from_numpy(known.tokens_NL[start : start + 2])
        states = student(ids)[:, :-1].flatten(0, 1)
        student_logs = (states @ student.head.T).log_softmax(-1)
        teacher_states = torch.from_numpy(known.states_NLD[start : start + 2][:, :-1]).flatten(0, 1)
        teacher_logs = (teacher_states @ known.head_VD.T).log_softmax(-1)
        following = ids[:, 1:].flatten()
        loss += float(torch.nn.functional.nll_loss(student_logs, following, reduction="sum"))
        kl += float((teacher_logs.exp() * (teacher_logs - student_logs)).sum())
        best = student_logs.max(-1)
        confidences.append(best.values.exp())
        hits.append(best.indices == following)
        positions += len(following)
    confidence, correct = torch.cat(confidences).numpy(), torch.cat(hits).numpy()
    return {"lm_loss": loss / positions, "kl": kl / positions, "ece": binned_error(confidence, correct),
            "accuracy": float(correct.mean())}  # fmt: skip


def step_seconds(known: teacher_data.TeacherData, rows: int) -> dict[str, float]:
    """Median seconds of a step of each arm, taken in turns."""
    ways = {}
    batch = np.arange(HELD_OUT, HELD_OUT + rows)
    for arm in ARMS:
        student, loss = prepared(known, arm, 0)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

        def step(
            loss: Callable[..., torch.Tensor] = loss, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        ways[arm] = step
    return common.medians(ways, rounds=7)


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def plot(arms: dict[str, dict], path: Path) -> None:
    """KL and loss of each arm against the bytes of a position."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "stillroom", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained")
        for axes, (key, label) in zip(
            figure.subplots(1, 2),
            (("kl", "KL to the teacher (nats)"), ("ece", "expected calibration error")), strict=True,
        ):  # fmt: skip
            names = list(arms)
            means, stds = ([arms[name][key][of] for name in names] for of in ("mean", "std"))
            places = range(len(names))[::-1]
            axes.errorbar(means, places, xerr=stds, fmt="o", color="#2f6fb0", capsize=3)
            axes.set_yticks(list(places), [f"{n} ({arms[n]['bytes']:,.0f} B)" for n in names])
            axes.set_xlabel(label)
            axes.axvline(arms["full"][key]["mean"], color="#999", linewidth=0.8, linestyle="--")
            axes.grid(axis="x", color="#e6e8ec")
        figure.savefig(path, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))


if __name__ == "__main__":
    main()
