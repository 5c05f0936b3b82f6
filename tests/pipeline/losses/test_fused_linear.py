"""The chunked head loss against the dense one in float64: values, gradients, ragged records, its optimum."""

import pytest
import torch

from pipeline.losses.fused_linear import head_loss, mix_labels
from pipeline.losses.sparse import SparseTargets, bucket_kl, sampled_kl
from pipeline.objectives.classification import label_loss

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


def top(k: int, seed: int = 12) -> SparseTargets:
    """The k largest of random distributions and the mass of the rest; the first position has no target."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.softmax(2 * torch.randn(P, V, generator=generator, dtype=torch.float64), 1)
    weights, ids = probs[1:].topk(k)
    log_tail = torch.cat([torch.tensor([-torch.inf]), (1 - weights.sum(1)).log()])
    return SparseTargets(
        torch.arange(1, P).repeat_interleave(k), ids.reshape(-1), weights.reshape(-1), log_tail
    )


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
def test_a_bucket_has_the_gradients_of_the_dense_loss_on_top_k(chunk: int) -> None:
    states, head, bias = world(13)
    targets = top(6)
    ours = head_loss(states, head, targets, bias, chunk, bucket=True) / P
    whole = bucket_kl(states @ head.T + bias, targets)
    weights = torch.cat([targets.weights, targets.log_tail.exp()])
    assert (ours + torch.special.xlogy(weights, weights).sum() / P).item() == pytest.approx(whole.item())
    inputs = (states, head, bias)
    for found, wanted in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(whole, inputs), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_a_bucket_with_almost_nothing_in_it_stays_finite_in_float32() -> None:
    targets = top(6)
    sure = torch.full((P, V), -60.0)
    sure[targets.positions, targets.ids] = 0.0
    free = sure.requires_grad_()
    loss = head_loss(free, torch.eye(V), targets, bucket=True)
    (gradient,) = torch.autograd.grad(loss, free)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert gradient[1:].sum(1).abs().max() < 1e-4, "the gradient of a probability sums to 0"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_labels_and_entries_mix_in_one_pass(alpha: float) -> None:
    states, head, _ = world(14)
    targets, labels = ragged(15), torch.arange(P) % V
    found = head_loss(states, head, mix_labels(labels, targets, alpha))
    expected = alpha * P * label_loss(states @ head.T, labels) + (1 - alpha) * head_loss(
        states, head, targets
    )
    assert found.item() == pytest.approx(expected.item())


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
