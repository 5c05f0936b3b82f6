"""The chunked head loss against the dense one in float64: values, gradients, ragged records, its optimum."""

import pytest
import torch

from pipeline.head_loss import head_loss
from pipeline.losses import SparseTargets, sampled_kl

P, D, V = 23, 5, 40


def world(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States, head and bias in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((P, D), (V, D), (V,))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)  # type: ignore[return-value]


def ragged(seed: int = 1) -> SparseTargets:
    """0 to 6 entries a position; some positions have none, one entry has weight 0, one id is there twice."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 7, (P,), generator=generator)
    counts[[0, 7, P - 1]] = 0
    counts[3] = 2
    positions = torch.arange(P).repeat_interleave(counts)
    ids = torch.randint(0, V, (len(positions),), generator=generator)
    weights = torch.rand(len(positions), generator=generator, dtype=torch.float64)
    first = int((positions < 3).sum())
    weights[first], ids[first + 1] = 0, ids[first]
    return SparseTargets(positions, ids, weights, torch.full((P,), -torch.inf, dtype=torch.float64))


def dense(
    states: torch.Tensor, head: torch.Tensor, targets: SparseTargets, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same sum from the whole matrix."""
    logits = states @ head.T + (0 if bias is None else bias)
    mass = torch.zeros(P, dtype=torch.float64).index_add(0, targets.positions, targets.weights)
    picked = targets.weights * logits[targets.positions, targets.ids]
    return (mass * logits.logsumexp(1)).sum() - picked.sum()


@pytest.mark.parametrize("chunk", [1, 2, 7, 22, 23, 24, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradients_are_the_dense_ones_for_every_chunk(chunk: int, biased: bool) -> None:
    states, head, bias = world()
    inputs = [states, head, *([bias] if biased else [])]
    targets = ragged()
    ours = head_loss(states, head, targets, bias if biased else None, chunk)
    whole = dense(states, head, targets, bias if biased else None)
    assert ours.item() == pytest.approx(whole.item(), abs=1e-10)
    for found, wanted in zip(
        torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * whole, inputs), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-10)


def test_the_gradient_is_that_of_finite_differences() -> None:
    states, head, bias = world(2)
    targets = ragged(3)
    assert torch.autograd.gradcheck(lambda s, h, b: head_loss(s, h, targets, b, 5), (states, head, bias))


def test_one_id_of_weight_one_is_cross_entropy() -> None:
    states, head, _ = world(4)
    labels = torch.arange(P) % V
    ones = SparseTargets(
        torch.arange(P), labels, torch.ones(P, dtype=torch.float64), torch.full((P,), -torch.inf)
    )
    expected = torch.nn.functional.cross_entropy(states @ head.T, labels, reduction="sum")
    assert head_loss(states, head, ones).item() == pytest.approx(expected.item(), abs=1e-10)


def test_it_differs_from_sampled_kl_by_a_constant_alone() -> None:
    targets = ragged(5)
    gaps = []
    for seed in (6, 7):
        states, head, _ = world(seed)
        gaps.append((head_loss(states, head, targets) / P - sampled_kl(states @ head.T, targets)).item())
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-10)


def test_the_optimum_over_free_logits_is_the_target() -> None:
    """States are free, the head is the identity: softmax ends at w / W."""
    targets = ragged(8)
    kept = targets.positions.unique()
    free = torch.zeros(P, V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=500, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = head_loss(free, torch.eye(V, dtype=torch.float64), targets)
        loss.backward()
        return loss

    optimizer.step(step)
    wanted = torch.zeros(P, V, dtype=torch.float64).index_put(
        (targets.positions, targets.ids), targets.weights, accumulate=True
    )
    wanted = wanted[kept] / wanted[kept].sum(1, keepdim=True)
    assert torch.allclose(torch.softmax(free.detach(), 1)[kept], wanted, atol=2e-3)


def test_nothing_to_learn_is_zero_with_zero_gradients() -> None:
    states, head, _ = world(9)
    none = SparseTargets(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(P)
    )
    loss = head_loss(states, head, none)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (states, head)))


def test_bfloat16_states_keep_float32_sums() -> None:
    states, head, _ = (tensor.detach() for tensor in world(10))
    targets = ragged(11)
    exact = head_loss(states, head, targets).item()
    low = head_loss(states.bfloat16(), head.bfloat16(), targets)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(exact, rel=0.02)
