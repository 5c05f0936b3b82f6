"""Losses on truncated and sampled targets against the dense ones, in float64: values, gradients, refusals."""

import numpy as np
import pytest
import torch

from pipeline.losses.divergences import distillation_loss
from pipeline.losses.sparse import SparseTargets, bucket_kl, sampled_kl
from pipeline.objectives.base import SoftLossSettings
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.training.checks import check_truncated
from storage.codecs import Sample, Threshold, TopK
from storage.errors import SpecMismatch
from tests.pipeline import oracle

P, V, K = 7, 60, 5
TEMPERATURES = [1.0, 2.0, 4.0]


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(P, V, generator=generator, dtype=torch.float64)


def top(teacher_PV: torch.Tensor, k: int = K) -> SparseTargets:
    """The k largest probabilities of each position and the log mass of the rest, in float64."""
    probs = torch.softmax(teacher_PV, -1)
    kept, ids = probs.topk(k)
    rest = probs.scatter(1, ids, 0).sum(1).log()
    positions = torch.arange(len(probs)).repeat_interleave(k)
    return SparseTargets(positions, ids.reshape(-1), kept.reshape(-1), rest)


def gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, at)
    return found


def test_full_kl_is_the_bucket_and_the_tails_own_kl() -> None:
    """The chain rule: full = bucket + (1 - a) KL(tail shapes), to 1e-10."""
    teacher, student = logits(0), logits(1)
    targets = top(teacher)
    mask = torch.zeros(P, V, dtype=torch.bool).index_put((targets.positions, targets.ids), torch.tensor(True))
    t, p = teacher.masked_fill(mask, -torch.inf), student.masked_fill(mask, -torch.inf)
    t, p = torch.log_softmax(t, -1), torch.log_softmax(p, -1)
    shapes = (t.exp() * (t - p)).masked_fill(mask, 0).sum(-1)
    rest = (targets.log_tail.exp() * shapes).mean()
    full = distillation_loss(student, teacher)
    assert (bucket_kl(student, targets) + rest).item() == pytest.approx(full.item(), abs=1e-10)
    assert bucket_kl(student, targets) < full


def test_the_gradient_of_the_bucket_is_p_minus_t_on_kept_ids() -> None:
    """And p (a - b) / (1 - b) on all others."""
    teacher, student = logits(2), logits(3).requires_grad_()
    targets = top(teacher)
    t, p = torch.softmax(teacher, -1), torch.softmax(student.detach(), -1)
    mask = torch.zeros(P, V, dtype=torch.bool).index_put((targets.positions, targets.ids), torch.tensor(True))
    a, b = (t * mask).sum(1, keepdim=True), (p * mask).sum(1, keepdim=True)
    expected = torch.where(mask, p - t, p * (a - b) / (1 - b)) / P
    assert torch.allclose(gradient(bucket_kl(student, targets), student), expected, atol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_bucket_is_zero_with_no_gradient_at_the_teacher(temperature: float) -> None:
    teacher = logits(4)
    student = (teacher + 3).requires_grad_()
    loss = bucket_kl(student, top(teacher), temperature)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss, student).abs().max().item() < 1e-12


def test_a_bucket_tempered_as_a_lump_charges_the_teacher_itself() -> None:
    """The known-wrong variant: at T = 2 it is far from zero where ours is zero."""
    teacher = logits(5, scale=1.0)
    targets = top(teacher)

    def lump(student_PV: torch.Tensor, temperature: float) -> torch.Tensor:
        said = torch.log_softmax(student_PV / temperature, -1)
        kept = said[targets.positions, targets.ids].view(P, K)
        rest = torch.log1p(-kept.exp().sum(1, keepdim=True))
        wanted = torch.cat([targets.weights.log().view(P, K), targets.log_tail[:, None]], 1) / temperature
        wanted = torch.log_softmax(wanted, -1)
        return (wanted.exp() * (wanted - torch.cat([kept, rest], 1))).sum(1).mean()

    assert lump(teacher, 1.0).item() == pytest.approx(0, abs=1e-12)
    assert lump(teacher, 2.0).item() > 0.05
    assert bucket_kl(teacher, targets, 2.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_are_those_of_finite_differences(temperature: float) -> None:
    targets, student = top(logits(6)), logits(7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bucket_kl(x, targets, temperature), (student,))
    assert torch.autograd.gradcheck(lambda x: sampled_kl(x, targets), (student,))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_with_every_id_kept_the_bucket_is_the_full_kl(temperature: float) -> None:
    teacher, student = logits(8), logits(9)
    whole = top(teacher, V)._replace(log_tail=torch.full((P,), -torch.inf, dtype=torch.float64))
    expected = distillation_loss(student, teacher, temperature).item()
    assert bucket_kl(student, whole, temperature).item() == pytest.approx(expected, abs=1e-10)


def test_positions_without_entries_cost_nothing_and_have_no_gradient() -> None:
    targets, student = top(logits(10)), logits(11).requires_grad_()
    kept = targets.positions != 2
    some = SparseTargets(*(column[kept] for column in targets[:3]), targets.log_tail)
    for loss in (bucket_kl(student, some), sampled_kl(student, some)):
        found = gradient(loss, student)
        assert torch.isfinite(found).all()
        assert found[2].abs().max() == 0


def test_a_tail_far_below_float32_keeps_a_finite_gradient() -> None:
    teacher = torch.zeros(1, V)
    teacher[0, 0] = 60
    student = teacher.clone().requires_grad_()
    loss = bucket_kl(student, top(teacher, 2))
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(gradient(loss, student)).all()


@pytest.mark.parametrize(
    "codec", [Sample(draws=22, seed=0, layout="plain"), Threshold(tau=0.07, seed=0, layout="plain")],
    ids=lambda codec: codec.name,
)  # fmt: skip
def test_the_gradient_of_sampled_kl_is_the_full_one_in_the_mean(codec: Sample | Threshold) -> None:
    """Over draws of one teacher: every coordinate within four standard errors of p - t."""
    repeats, vocab = 2000, 80
    teacher = oracle.logits(1, vocab, seed=2)
    student = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)).double()
    p = torch.softmax(student, -1).numpy()[0]
    full = p - oracle.probabilities(teacher)[0]
    found = []
    for row in range(repeats):
        targets = SparseTargets.of(oracle.encoded(teacher, codec, row))
        at = student.clone().requires_grad_()
        found.append(gradient(sampled_kl(at, targets), at).numpy()[0])
    weights = p - np.array(found)  # W = 1: what was drawn
    assert oracle.four_standard_errors(weights, p - full) < 1


def test_sampled_kl_of_all_ids_is_the_full_kl() -> None:
    teacher, student = logits(12), logits(13)
    whole = top(teacher, V)
    full = distillation_loss(student, teacher).item()
    assert sampled_kl(student, whole).item() == pytest.approx(full, abs=1e-10)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "skewed"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_each_divergence_on_dense_targets(divergence: str, temperature: float) -> None:
    """By its definition in numpy; zero with no gradient at the teacher; gradient by finite differences."""
    teacher, student = logits(14), logits(15)
    t, p = (torch.softmax(x / temperature, -1).numpy() for x in (teacher, student))

    def kl(a: np.ndarray, b: np.ndarray) -> float:
        return float((a * np.log(a / b)).sum(1).mean())

    expected = {
        "forward": kl(t, p),
        "reverse": kl(p, t),
        "jsd": (kl(t, (t + p) / 2) + kl(p, (t + p) / 2)) / 2,
        "skewed": kl(t, 0.3 * t + 0.7 * p),
    }[divergence]

    def loss(x: torch.Tensor) -> torch.Tensor:
        return distillation_loss(x, teacher, temperature, divergence, skew=0.3)  # type: ignore[arg-type]

    assert loss(student).item() == pytest.approx(temperature**2 * expected, abs=1e-10)
    same = teacher.clone().requires_grad_()
    assert loss(same).item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss(same), same).abs().max() < 1e-12
    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


def test_the_optimum_of_plain_topk_is_biased_and_that_of_the_bucket_is_not() -> None:
    """Free logits: renormalised top-k ends at t / a on the kept ids, the bucket at t."""
    teacher = logits(16)
    targets = top(teacher)
    kept = targets.weights.view(P, K)

    def fitted(loss_of) -> torch.Tensor:  # type: ignore[no-untyped-def]
        free = torch.zeros(P, V, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([free], max_iter=400, line_search_fn="strong_wolfe")

        def step() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(free)
            loss.backward()
            return loss

        optimizer.step(step)
        return torch.softmax(free.detach(), -1)[targets.positions, targets.ids].view(P, K)

    assert torch.allclose(fitted(lambda x: bucket_kl(x, targets)), kept, atol=1e-4)
    share = kept / kept.sum(1, keepdim=True)
    renormalised = targets._replace(weights=share.reshape(-1))
    assert torch.allclose(fitted(lambda x: sampled_kl(x, renormalised)), share, atol=1e-3)
    assert (share - kept).abs().max() > 0.05


def test_the_recipe_mixes_labels_and_entries() -> None:
    student, targets, labels = logits(17), top(logits(18)), torch.arange(P)
    for sampled, soft in ((False, bucket_kl(student, targets, 2.0)), (True, sampled_kl(student, targets))):
        settings = SoftLossSettings(2.0, sampled=sampled)
        mixed = CLASSIFICATION.mixed_loss(student, labels, targets, 0.3, settings)
        hard = torch.nn.functional.cross_entropy(student, labels)
        assert mixed.item() == pytest.approx((0.3 * hard + 0.7 * soft).item(), abs=1e-12)


def test_what_truncated_targets_cannot_give_is_refused_with_the_reason() -> None:
    topk, sampled = TopK(k=5, layout="plain"), Threshold(tau=0.07, seed=0, layout="plain")
    for divergence in ("reverse", "jsd", "skewed"):
        with pytest.raises(SpecMismatch, match=r"recipe\.divergence.*\n.*ids that the cache does not hold"):
            check_truncated("runs.toy", topk, divergence, 1.0)
    with pytest.raises(SpecMismatch, match=r"recipe\.temperature(.|\n)*unbiased for the probability"):
        check_truncated("runs.toy", sampled, "forward", 2.0)
    check_truncated("runs.toy", topk, "forward", 2.0)
    check_truncated("runs.toy", sampled, "forward", 1.0)
    check_truncated("runs.toy", None, "jsd", 4.0)


def test_entries_as_logits_spread_the_tail_evenly() -> None:
    targets = top(logits(19))
    made = torch.softmax(targets.logits(V), -1)
    assert made[targets.positions, targets.ids].numpy() == pytest.approx(targets.weights.numpy(), abs=1e-6)
    assert (made.sum(1) - made[targets.positions, targets.ids].view(P, K).sum(1)).numpy() == pytest.approx(
        targets.log_tail.exp().numpy(), abs=1e-6
    )
