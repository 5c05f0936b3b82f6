"""The closed cases of ALGORITHMS.md, section 1, and what the recipe's parts must not do."""

import math

import pytest
import torch

from pipeline.data.rows import NO_LABEL
from pipeline.losses.divergences import distillation_loss
from pipeline.objectives.base import SoftLossSettings
from pipeline.objectives.classification import CLASSIFICATION, label_loss

mixed_loss = CLASSIFICATION.mixed_loss


def logits(*rows: list[float]) -> torch.Tensor:
    """Logits of these probabilities, in float64."""
    return torch.tensor(rows, dtype=torch.float64).log()


def some_logits(seed: int, rows: int = 6, classes: int = 5) -> torch.Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_kl_of_nine_to_one_from_eight_to_two_is_0_0367_nats() -> None:
    found = distillation_loss(logits([0.8, 0.2]), logits([0.9, 0.1]), 1.0)
    assert found.item() == pytest.approx(0.9 * math.log(9 / 8) + 0.1 * math.log(0.5), abs=1e-12)
    assert found.item() == pytest.approx(0.0367, abs=5e-5)


def test_the_textbook_row_costs_ce_0_2231_and_kl_0_0367() -> None:
    student, teacher, label = logits([0.2, 0.8]), logits([0.1, 0.9]), torch.tensor([1])
    assert label_loss(student, label).item() == pytest.approx(0.2231, abs=5e-5)
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(0.0367, abs=5e-5)
    mixed = mixed_loss(student, label, teacher, 0.25, SoftLossSettings(1.0)).item()
    assert mixed == pytest.approx(0.25 * 0.22314 + 0.75 * 0.03669, abs=5e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_gradient_is_that_of_finite_differences(temperature: float) -> None:
    student, teacher = some_logits(0).requires_grad_(), some_logits(1)
    labels = torch.tensor([0, 1, NO_LABEL, 4, NO_LABEL, 2])
    settings = SoftLossSettings(temperature)
    assert torch.autograd.gradcheck(lambda x: mixed_loss(x, labels, teacher, 0.3, settings), (student,))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_loss_and_gradient_vanish_where_the_student_equals_the_teacher(temperature: float) -> None:
    teacher = some_logits(2)
    student = (teacher + 7).requires_grad_()  # logits are free up to a constant
    loss = distillation_loss(student, teacher, temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.abs().max().item() == pytest.approx(0, abs=1e-12)


def test_the_factor_t_squared_keeps_the_size_of_the_gradient() -> None:
    sizes = {}
    for temperature in (1.0, 20.0, 100.0, 200.0):
        student = some_logits(3).requires_grad_()
        (gradient,) = torch.autograd.grad(distillation_loss(student, some_logits(4), temperature), student)
        sizes[temperature] = gradient.norm().item()
    assert sizes[200.0] == pytest.approx(
        sizes[100.0], rel=0.02
    )  # a limit: (x - t) / C, centred (Hinton 2015)
    assert 0.3 < sizes[20.0] / sizes[1.0] < 3


def test_the_soft_loss_is_divided_by_rows_and_never_by_classes() -> None:
    student, teacher = some_logits(5), some_logits(6)
    by_hand = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean()
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(by_hand.item(), rel=1e-12)
    twice = distillation_loss(student.repeat(2, 1), teacher.repeat(2, 1), 1.0)
    assert twice.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_rows_without_a_label_give_no_cross_entropy_and_do_not_dilute_it() -> None:
    student = some_logits(7).requires_grad_()
    labels = torch.tensor([1, NO_LABEL, 3, NO_LABEL, NO_LABEL, NO_LABEL])
    alone = label_loss(student[[0, 2]], labels[[0, 2]])
    loss = label_loss(student, labels)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-12)
    assert gradient[[1, 3, 4, 5]].abs().max().item() == 0


def test_a_batch_without_any_label_has_a_cross_entropy_of_zero_and_no_nan() -> None:
    student = some_logits(8).requires_grad_()
    loss = label_loss(student, torch.full((6,), NO_LABEL))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert gradient.abs().max().item() == 0


def test_alpha_one_never_reads_the_teacher_and_alpha_zero_never_reads_labels() -> None:
    student, teacher = some_logits(9), some_logits(10)
    labels, nonsense = torch.arange(6) % 5, torch.full((6, 5), float("nan"), dtype=torch.float64)
    settings = SoftLossSettings(2.0)
    assert mixed_loss(student, labels, nonsense, 1.0, settings).item() == label_loss(student, labels).item()
    out_of_range = torch.full((6,), 99)
    soft = mixed_loss(student, out_of_range, teacher, 0.0, settings)
    assert soft.item() == distillation_loss(student, teacher, 2.0).item()
