"""Several tasks for one student: a batch of every task a step, the weighted mean of their losses.

The student's last layer is linear, and has the outputs of all tasks side by side: the same as a linear head
for each on what they share (Caruana 1997; Liu et al. 2019, arXiv:1904.09482).
"""

from collections.abc import Generator, Mapping
from contextlib import closing
from itertools import accumulate, count
from typing import Any, NamedTuple

import torch

from pipeline.objectives.base import Validation
from pipeline.streaming.batch import DistillBatch
from pipeline.students.base import TaskHead
from pipeline.training.job import Fit
from pipeline.training.workload import Workload

# Within an epoch of the run, a task's second round is its own epoch + ROUND, its third epoch + 2 ROUND.
ROUND = 2**20


class TaskBatches(NamedTuple):
    """One step of a student of several tasks: a batch of each, in the order of the tasks."""

    parts: tuple[DistillBatch, ...]

    def to(self, device: torch.device) -> "TaskBatches":
        """The same batches on another device."""
        return TaskBatches(tuple(part.to(device) for part in self.parts))

    @property
    def num_rows(self) -> int:
        """Rows of all tasks."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_targets(self) -> int:
        """Targets of all tasks."""
        return sum(part.num_targets for part in self.parts)


class MultitaskWorkload:
    """Workloads by the names of their tasks, and the weight of each one's loss.

    `heads` has the outputs of each task, from and to. `workload` is what the student is trained with.
    `counts` has rows, losses and evaluations of each task so far, as JSON: a checkpoint has it, and `resume`
    continues from there.
    """

    def __init__(self, workloads: Mapping[str, Workload], weights: Mapping[str, float]) -> None:
        self._workloads = workloads
        total = sum(weights[task] for task in workloads)
        self._shares = {name: weights[name] / total for name in workloads}
        ends = list(accumulate(workload.num_outputs for workload in workloads.values()))
        self.heads = dict(zip(workloads, zip([0, *ends], ends, strict=False), strict=True))
        self.counts: dict[str, dict[str, Any]] = {
            name: {"rows": 0, "losses": [], "evaluations": []} for name in workloads
        }
        self._longest = max(workloads, key=lambda name: workloads[name].steps)

    @property
    def workload(self) -> Workload:
        """One workload of all tasks. The task with the most batches gives the steps of an epoch."""
        parts, steps = self._workloads.values(), self._workloads[self._longest].steps
        return Workload(
            num_outputs=sum(part.num_outputs for part in parts),
            num_targets=round(sum(part.num_targets * steps / part.steps for part in parts)),
            steps=steps,
            batches=self._epoch,
            loss=self._loss,
            validate=self._validate,
            by_loss=any(part.by_loss for part in parts),
            cut_rows=sum(part.cut_rows for part in parts),
            padding=None,
            rows_per_item=1.0,
        )

    def task_records(self, fit: Fit) -> dict[str, dict[str, Any]]:
        """The record of each task: rows seen, its curve, and its scores in the state that was kept."""
        found = {}
        for name, counts in self.counts.items():
            evaluations = counts["evaluations"]
            curve = [{**point, **own} for point, own in zip(fit.curve, evaluations, strict=True)]
            best = next(point for point in curve if point["step"] == fit.best_step)
            found[name] = {
                "rows_seen": counts["rows"],
                "cut_rows": self._workloads[name].cut_rows,
                "best_accuracy": best["validation_accuracy"],
                "best_loss": best["validation_loss"],
                "curve": curve,
            }
        return found

    def resume(self, counts: dict[str, dict[str, Any]]) -> None:
        """Continue from the counts of a checkpoint."""
        for name, own in self.counts.items():
            own.update(counts[name])

    def _epoch(self, epoch: int, start: int = 0) -> Generator[TaskBatches, None, None]:
        """As many steps as the longest task has batches; shorter ones begin again, in another order.

        A function of (seed, epoch) alone, as the order of each task is. The first round of a task is the
        epoch that it has in a run of its own.
        """
        rounds = {name: _rounds(self._workloads[name], epoch) for name in self._workloads}
        for name, own in rounds.items():
            for _ in range(start if name != self._longest else 0):
                next(own)  # the number of batches in a round is known at its end alone
        with closing(self._workloads[self._longest].batches(epoch, start)) as leading:
            try:
                for first in leading:
                    yield TaskBatches(
                        tuple(first if name == self._longest else next(rounds[name]) for name in rounds)
                    )
            finally:
                for own in rounds.values():
                    own.close()  # ends the thread that reads ahead

    def _loss(self, model: torch.nn.Module, batch: TaskBatches, done: float) -> torch.Tensor:
        """The mean of the tasks' losses, weighted."""
        parts = []
        for (name, workload), part in zip(self._workloads.items(), batch.parts, strict=True):
            loss = workload.loss(TaskHead(model, self.heads[name]), part, done)
            self.counts[name]["rows"] += part.num_rows
            self.counts[name]["losses"].append(float(loss.detach()))
            parts.append(self._shares[name] * loss)
        return torch.stack(parts).sum()

    def _validate(self, model: torch.nn.Module) -> Validation:
        """The weighted means of the validations of all tasks."""
        score = loss = 0.0
        for name, workload in self._workloads.items():
            found = workload.validate(TaskHead(model, self.heads[name]))
            counts = self.counts[name]
            losses = counts["losses"]
            point = {"rows": counts["rows"], "train_loss": sum(losses) / max(1, len(losses))}
            point |= {"validation_accuracy": found.score, "validation_loss": found.loss}
            counts["evaluations"].append(point)
            counts["losses"] = []
            score += self._shares[name] * found.score
            loss += self._shares[name] * found.loss
        return Validation(score, loss)


def _rounds(workload: Workload, epoch: int) -> Generator[DistillBatch, None, None]:
    """The batches of an epoch of a task, and of more epochs of it, numbered past those of any run."""
    for number in count():
        yield from workload.batches(epoch + number * ROUND)
