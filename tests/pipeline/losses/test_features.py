"""Losses on hidden states: their formulas in float64, term by term, and what must not change them."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.config.match import matched_parts
from pipeline.losses.features import (
    FEATURE_LOSSES,
    pool_states,
    relation_kl,
    score_mse,
    state_cosine,
    state_mse,
    unflatten_rows,
)

LENGTHS, HEADS = (5, 2, 1), 2
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
Array = npt.NDArray[np.float64]


def vectors(width: int, seed: int) -> torch.Tensor:
    """Query, key and value of a batch [3, 5, 3 width], with something at padding too."""
    return torch.randn(3, 5, 3 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(of: torch.Tensor, row: int, part: int, number: int, heads: int = HEADS) -> Array:
    """What one head has of query (0), key (1) or value (2) of a row's true tokens: [length, d]."""
    width = of.shape[-1] // 3
    each = width // heads
    start = part * width + number * each
    cut: Array = of[row, : LENGTHS[row], start : start + each].numpy()
    return cut


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def test_the_squared_distance_of_states_is_the_mean_over_positions_and_dimensions() -> None:
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    assert state_mse(student, teacher).item() == pytest.approx((1 + 4 + 0 + 1) / 4)


def test_the_angle_of_states_does_not_see_their_length_and_half_of_patient_distillation_is_it() -> None:
    student, teacher = vectors(4, 1)[0], vectors(4, 2)[0]
    found = state_cosine(student, teacher)
    assert state_cosine(3 * student, teacher).item() == pytest.approx(found.item())
    assert state_cosine(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert state_cosine(-teacher, teacher).item() == pytest.approx(2)
    unit = [part / part.norm(dim=-1, keepdim=True) for part in (student, teacher)]
    patient = ((unit[0] - unit[1]) ** 2).sum(-1).mean()
    assert 2 * found.item() == pytest.approx(patient.item())


def test_attention_scores_are_compared_pair_by_pair_of_true_tokens() -> None:
    student, teacher = vectors(4, 1), vectors(6, 2)
    squares = []
    for row in range(3):
        for number in range(HEADS):
            scores = [
                head(of, row, 0, number) @ head(of, row, 1, number).T / math.sqrt(of.shape[-1] / 3 / HEADS)
                for of in (student, teacher)
            ]
            squares += list(((scores[0] - scores[1]) ** 2).ravel())
    found = score_mse(student, teacher, MASK, HEADS)
    assert found.item() == pytest.approx(np.mean(squares), rel=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
def test_relations_are_the_divergence_of_softmaxes_within_a_row(heads: int) -> None:
    student, teacher = vectors(4, 1), vectors(6, 2)
    total, count = 0.0, 0
    for part in range(3):
        for row in range(3):
            for number in range(heads):
                said, told = (
                    softmax(own @ own.T / math.sqrt(own.shape[1]))
                    for own in (head(of, row, part, number, heads) for of in (student, teacher))
                )
                total += float((told * np.log(told / said)).sum())
                count += LENGTHS[row]
    found = relation_kl(student, teacher, MASK, heads)
    assert found.item() == pytest.approx(total / (count / 3), rel=1e-12)


def test_relations_of_equal_vectors_are_equal_and_a_rotation_within_a_head_changes_nothing() -> None:
    student, teacher = vectors(4, 1), vectors(4, 2)
    assert relation_kl(teacher, teacher, MASK, HEADS).item() == pytest.approx(0, abs=1e-12)
    turns = [torch.linalg.qr(vectors(2, seed)[0][:2, :2])[0] for seed in range(2, 2 + 3 * HEADS)]
    turned = student @ torch.block_diag(*turns)
    assert not torch.allclose(turned, student)
    found = relation_kl(student, teacher, MASK, HEADS)
    assert relation_kl(turned, teacher, MASK, HEADS).item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [score_mse, relation_kl])
def test_what_stands_at_padding_counts_nothing_and_gradients_are_numbers(loss: object) -> None:
    assert callable(loss)
    student, teacher = vectors(4, 1), vectors(4, 2)
    own = student.clone().requires_grad_()
    found = loss(own, teacher, MASK, HEADS)
    found.backward()
    assert own.grad is not None
    assert torch.isfinite(own.grad).all()
    assert not own.grad[~MASK].any()
    assert own.grad[MASK].any()
    student[~MASK] = 1e3
    teacher[~MASK] = -1e3
    assert loss(student, teacher, MASK, HEADS).item() == pytest.approx(found.item(), rel=1e-12)


def test_vectors_in_a_row_stand_where_the_mask_says() -> None:
    flat = torch.arange(1, 9).float()[:, None]
    assert unflatten_rows(flat, MASK)[..., 0].tolist() == [
        [1, 2, 3, 4, 5],
        [6, 7, 0, 0, 0],
        [8, 0, 0, 0, 0],
    ]


def test_every_part_that_a_recipe_can_match_has_a_loss_and_every_loss_a_part() -> None:
    assert tuple(FEATURE_LOSSES) == matched_parts()


def test_pooled_states_are_those_of_true_tokens() -> None:
    states_BLW = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    mask_BL = torch.tensor([[True, True, False], [True, True, True]])
    mean = torch.stack([states_BLW[0, :2].mean(0), states_BLW[1].mean(0)])
    assert torch.allclose(pool_states(states_BLW, mask_BL, "mean"), mean)
    assert torch.equal(pool_states(states_BLW, mask_BL, "first"), states_BLW[:, 0])
    assert torch.equal(pool_states(states_BLW, mask_BL, "none"), states_BLW[mask_BL])
