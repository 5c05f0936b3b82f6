"""Several lessons for one student: a batch of every task a step, the weighted mean of their losses.

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

# Within an epoch of the run, a task's second round is epoch + ROUND of its own, its third epoch + 2 ROUND.
ROUND = 2**20


class TaskBatches(NamedTuple):
    """What a student of several tasks sees in one step: a batch of each, in the order of the tasks."""

    parts: tuple[DistillBatch, ...]

    def to(self, device: torch.device) -> "TaskBatches":
        """The same batches on another device."""
        return TaskBatches(tuple(part.to(device) for part in self.parts))

    @property
    def num_rows(self) -> int:
        """Of all tasks."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_targets(self) -> int:
        """Of all tasks."""
        return sum(part.num_targets for part in self.parts)


class MultitaskWorkload:
    """Lessons by the names of their tasks, and how much the loss of each counts.

    `heads` has the outputs of each task, from and to. `lesson` is what the student is trained with. `kept` is
    what happened to each task until now, as JSON: a checkpoint has it, and `resume` goes on from there.
    """

    def __init__(self, lessons: Mapping[str, Workload], weights: Mapping[str, float]) -> None:
        self._lessons = lessons
        self._shares = {name: weights[name] / sum(weights[task] for task in lessons) for name in lessons}
        ends = list(accumulate(lesson.num_outputs for lesson in lessons.values()))
        self.heads = dict(zip(lessons, zip([0, *ends], ends, strict=False), strict=True))
        self.kept: dict[str, dict[str, Any]] = {
            name: {"rows": 0, "losses": [], "looks": []} for name in lessons
        }
        self._longest = max(lessons, key=lambda name: lessons[name].steps)

    @property
    def lesson(self) -> Workload:
        """One lesson of all tasks. The one with the most batches says how many steps an epoch has."""
        lessons, steps = self._lessons.values(), self._lessons[self._longest].steps
        return Workload(
            num_outputs=sum(lesson.num_outputs for lesson in lessons),
            num_targets=round(sum(lesson.num_targets * steps / lesson.steps for lesson in lessons)),
            steps=steps,
            batches=self._epoch,
            loss=self._loss,
            validate=self._validate,
            by_loss=any(lesson.by_loss for lesson in lessons),
            cut_rows=sum(lesson.cut_rows for lesson in lessons),
            padding=None,
            rows_a_piece=1.0,
        )

    def told(self, fit: Fit) -> dict[str, dict[str, Any]]:
        """What became of each task: rows seen, its curve, and where it stood in the state that was kept."""
        found = {}
        for name, kept in self.kept.items():
            curve = [{**point, **look} for point, look in zip(fit.curve, kept["looks"], strict=True)]
            best = next(point for point in curve if point["step"] == fit.best_step)
            found[name] = {
                "rows_seen": kept["rows"],
                "cut_rows": self._lessons[name].cut_rows,
                "best_accuracy": best["validation_accuracy"],
                "best_loss": best["validation_loss"],
                "curve": curve,
            }
        return found

    def resume(self, kept: dict[str, dict[str, Any]]) -> None:
        """Go on from where another process stood."""
        for name, own in self.kept.items():
            own.update(kept[name])

    def _epoch(self, epoch: int, start: int = 0) -> Generator[TaskBatches, None, None]:
        """As many steps as the longest task has batches; shorter ones begin again, in another order.

        A function of (seed, epoch) alone, as the order of each task is. The first round of a task is the
        epoch that it has in a run of its own.
        """
        rounds = {name: _rounds(self._lessons[name], epoch) for name in self._lessons}
        for name, own in rounds.items():
            for _ in range(start if name != self._longest else 0):
                next(own)  # how many a round has is known at its end alone
        with closing(self._lessons[self._longest].batches(epoch, start)) as leading:
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
        for (name, lesson), part in zip(self._lessons.items(), batch.parts, strict=True):
            loss = lesson.loss(TaskHead(model, self.heads[name]), part, done)
            self.kept[name]["rows"] += part.num_rows
            self.kept[name]["losses"].append(float(loss.detach()))
            parts.append(self._shares[name] * loss)
        return torch.stack(parts).sum()

    def _validate(self, model: torch.nn.Module) -> Validation:
        """The weighted means of what is seen of each task."""
        accuracy = loss = 0.0
        for name, lesson in self._lessons.items():
            seen = lesson.validate(TaskHead(model, self.heads[name]))
            kept = self.kept[name]
            look = {"rows": kept["rows"], "train_loss": sum(kept["losses"]) / max(1, len(kept["losses"]))}
            look |= {"validation_accuracy": seen.score, "validation_loss": seen.loss}
            kept["looks"].append(look)
            kept["losses"] = []
            accuracy += self._shares[name] * seen.score
            loss += self._shares[name] * seen.loss
        return Validation(accuracy, loss)


def _rounds(lesson: Workload, epoch: int) -> Generator[DistillBatch, None, None]:
    """The batches of a lesson's epoch, and of more epochs of it, numbered past those of any run."""
    for number in count():
        yield from lesson.batches(epoch + number * ROUND)
