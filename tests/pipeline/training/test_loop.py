"""The loop finds the best state, knows when to stop, and says so where numbers leave the numbers."""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch

from pipeline.objectives.base import Validation
from pipeline.objectives.classification import label_loss
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import call_model
from pipeline.training.job import Fit
from pipeline.training.loop import TrainingFunctions, TrainingSettings, fit, learning_rate_factor
from storage.errors import StillroomError, TrainingError

SETTINGS = TrainingSettings(
    epochs=4,
    steps=16,
    learning_rate=0.05,
    warmup=0.0,
    weight_decay=0.0,
    evaluations_per_epoch=2,
    patience=99,
)


class Linear(torch.nn.Module):
    """Logits are a linear function of the counts of four tokens."""

    reads = ("input_ids",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        counts = torch.nn.functional.one_hot(input_ids, 4).float().sum(1)
        logits: torch.Tensor = self.head(counts)
        return logits


def epoch(number: int) -> Iterator[DistillBatch]:
    """The label is whether token 3 is there."""
    generator = torch.Generator().manual_seed(number)
    for _ in range(4):
        ids = torch.randint(0, 4, (32, 3), generator=generator)
        labels = (ids == 3).any(1).long()
        yield DistillBatch({"input_ids": ids}, labels, torch.zeros(32, 0))


def loss(model: torch.nn.Module, batch: DistillBatch, done: float = 0.0) -> torch.Tensor:
    return label_loss(call_model(model, batch.inputs), batch.labels_T)


def validate(model: torch.nn.Module) -> Validation:
    with torch.inference_mode():
        batch = next(epoch(1000))
        logits = call_model(model, batch.inputs)
        right = (logits.argmax(1) == batch.labels_T).float().mean().item()
        return Validation(right, label_loss(logits, batch.labels_T).item())


FUNCTIONS = TrainingFunctions(epoch, loss, validate)


def scripted(
    *looks: tuple[float, float],
) -> tuple[Callable[[torch.nn.Module], Validation], list[torch.Tensor]]:
    """A validation that says these (accuracy, loss), and the weights at each look."""
    weights: list[torch.Tensor] = []

    def say(model: torch.nn.Module) -> Validation:
        assert not model.training
        weights.append(next(model.parameters()).detach().clone())
        return Validation(*looks[min(len(weights) - 1, len(looks) - 1)])

    return say, weights


def test_a_student_learns_and_the_curve_tells_of_it() -> None:
    model, seen = Linear(), 0

    def advance(rows: int) -> None:
        nonlocal seen
        seen += rows

    done = fit(model, FUNCTIONS, SETTINGS._replace(epochs=20, steps=80), advance)
    assert (done.steps, done.rows_seen, seen, done.stopped) == (80, 80 * 32, 80 * 32, "epochs")
    assert done.best_accuracy > 0.95
    assert done.curve[-1]["validation_loss"] < done.curve[0]["validation_loss"] / 2
    assert [point["step"] for point in done.curve] == list(range(2, 82, 2))
    assert validate(model).score == done.best_accuracy
    assert not model.training


def test_the_state_that_is_kept_is_the_best_one_and_ties_go_to_the_lower_loss() -> None:
    say, weights = scripted((0.5, 1.0), (0.9, 0.5), (0.9, 0.3), (0.9, 0.3), (0.6, 0.1))
    model = Linear()
    done = fit(model, FUNCTIONS._replace(validate=say), SETTINGS)
    assert torch.equal(model.head.weight, weights[2])
    assert (done.best_step, done.best_accuracy) == (6, 0.9)


def test_where_the_loss_ranks_a_lower_one_is_kept_although_accuracy_falls() -> None:
    say, weights = scripted((0.9, 1.0), (0.5, 0.4), (0.8, 0.6))
    model = Linear()
    done = fit(model, FUNCTIONS._replace(validate=say), SETTINGS._replace(by_loss=True, patience=3))
    assert torch.equal(model.head.weight, weights[1])
    assert (done.best_step, done.best_loss, done.stopped) == (4, 0.4, "patience")


def test_waiting_for_batches_is_told_apart_from_computing_and_looking() -> None:
    def slow(number: int) -> Iterator[DistillBatch]:
        for batch in epoch(number):
            time.sleep(0.05)
            yield batch

    def look(model: torch.nn.Module) -> Validation:
        time.sleep(0.2)
        return validate(model)

    one = SETTINGS._replace(epochs=1, steps=4)
    quick, waited = (
        fit(Linear(), FUNCTIONS._replace(validate=look), one),
        fit(Linear(), TrainingFunctions(slow, loss, look), one),
    )
    assert quick.waiting < waited.waiting > 0.5
    assert waited.targets_per_second < 4 * 32 / 0.2


def test_training_stops_after_as_many_looks_without_gain_as_patience_says() -> None:
    say, weights = scripted((0.5, 1.0), (0.9, 0.5), (0.8, 0.5))
    done = fit(Linear(), FUNCTIONS._replace(validate=say), SETTINGS._replace(patience=3))
    assert done.stopped == "patience"
    assert len(weights) == 5
    assert done.steps == 10


def test_epochs_that_end_early_still_end_with_a_look() -> None:
    say, weights = scripted((0.5, 1.0))
    done = fit(
        Linear(),
        TrainingFunctions(lambda n: list(epoch(n))[:3], loss, say),
        SETTINGS._replace(epochs=1, steps=4),
    )
    assert [point["step"] for point in done.curve] == [2, 3]
    assert len(weights) == 2


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_nothing() -> None:
    paces = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert paces[0] == pytest.approx(0.1)
    assert paces[9] == pytest.approx(1.0)
    assert max(paces) <= 1
    assert paces[55] == pytest.approx(0.5)
    assert paces[100] == 0
    assert paces[10:] == sorted(paces[10:], reverse=True)
    assert [learning_rate_factor(step, 1, 0.0) for step in (0, 1)] == [1, 0]


def test_a_step_of_the_schedule_is_a_step_of_the_optimizer() -> None:
    seen: list[float] = []
    model = Linear()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()

    def track(net: torch.nn.Module, batch: DistillBatch, done: float) -> torch.Tensor:
        seen.append(model.head.bias[0].item())
        logits: torch.Tensor = call_model(net, batch.inputs)
        return logits[:, 0].mean()  # a constant gradient: AdamW moves by the learning rate, whatever its size

    functions = TrainingFunctions(epoch, track, scripted((0.0, 1.0))[0])
    fit(model, functions, SETTINGS._replace(epochs=1, steps=4, warmup=0.5))
    moved = [before - after for before, after in pairwise(seen)]
    assert moved == pytest.approx([0.05 * 0.5, 0.05 * 1.0, 0.05 * 1.0], rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_training_loss_that_is_no_number_is_one_clear_error(bad: float) -> None:
    with pytest.raises(TrainingError, match=r"the training loss is .* at step 1") as said:
        fit(Linear(), FUNCTIONS._replace(loss=lambda net, batch, done: loss(net, batch) * bad), SETTINGS)
    assert isinstance(said.value, StillroomError)
    assert isinstance(said.value, ArithmeticError)
    assert "Lower learning_rate" in str(said.value)


def test_a_validation_loss_that_is_no_number_is_said_before_it_is_written_anywhere() -> None:
    with pytest.raises(TrainingError, match="the validation loss is nan at step 2"):
        fit(Linear(), FUNCTIONS._replace(validate=scripted((0.5, float("nan")))[0]), SETTINGS)


def test_the_same_seed_trains_to_the_same_bits() -> None:
    def run() -> tuple[Fit, torch.Tensor]:
        model = Linear()
        return fit(model, FUNCTIONS, SETTINGS), model.head.weight.detach()

    (first, weights), (second, again) = run(), run()
    assert torch.equal(weights, again)
    assert first.curve == second.curve


def test_bfloat16_leaves_a_model_that_answers_in_float32() -> None:
    model = Linear()
    done = fit(model, FUNCTIONS, SETTINGS._replace(bfloat16=True))
    assert done.steps == 16
    batch = next(epoch(0))
    assert call_model(model, batch.inputs).dtype == torch.float32
    assert model.head.weight.dtype == torch.float32
