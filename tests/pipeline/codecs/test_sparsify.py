"""The codecs against the dense oracle: what they keep, how unbiased they are, what their noise is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.codecs.sparsify import NotFinite, sparsify, sparsify_and_measure
from pipeline.data import counter_rng
from pipeline.data.counter_rng import Keys
from storage.codecs import Sample, SparseCodec, Threshold, TopK
from storage.entries import concatenate
from tests.pipeline import oracle

REPEATS = 3000
CODECS: list[SparseCodec] = [
    TopK(k=12, layout="plain"),
    Sample(draws=22, seed=0, layout="plain"),
    Threshold(tau=0.07, seed=0, layout="plain"),
]


def many_draws(logits_V: torch.Tensor, codec: SparseCodec) -> np.ndarray:
    """The dense weights [REPEATS, V] of one distribution under as many names."""
    rows = counter_rng.row_words([oracle.row_name(i) for i in range(REPEATS)])
    return oracle.dense(
        sparsify(logits_V.expand(REPEATS, -1), codec, Keys(rows, np.zeros(REPEATS, np.int64))), len(logits_V)
    )


def test_philox_gives_the_known_answers_of_its_authors() -> None:
    def one(counter: list[int], key: int) -> list[int]:
        words = counter_rng.philox(tuple(np.array([word], np.uint64) for word in counter), key)  # type: ignore[arg-type]
        return [int(word[0]) for word in words]

    assert one([0, 0, 0, 0], 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert one([0xFFFFFFFF] * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert one(pi, 0xA4093822 | 0x299F31D0 << 32) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_draws_are_uniform_and_their_number_changes_none_of_them() -> None:
    rows = np.repeat(counter_rng.row_words(["ab" * 16]), 4000, axis=0)
    many = counter_rng.uniforms(7, rows, np.arange(4000), 5)
    assert many.min() >= 0
    assert many.max() < 1
    assert np.abs(many.mean(axis=0) - 0.5).max() < 4 * np.sqrt(1 / 12 / 4000)
    assert np.abs(np.corrcoef(many.T) - np.eye(5)).max() < 4 / np.sqrt(4000)
    assert (counter_rng.uniforms(7, rows, np.arange(4000), 2) == many[:, :2]).all()
    assert (counter_rng.uniforms(8, rows, np.arange(4000), 5) != many).all()
    assert (counter_rng.uniforms(7, rows, np.arange(4000), 5, stream=1) != many).all()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("vocab", [2, 257, 5000])
def test_entries_and_tail_have_unit_mass_and_ids_are_distinct(codec: SparseCodec, vocab: int) -> None:
    entries = oracle.encoded(oracle.logits(50, vocab), codec)
    made = oracle.dense(entries, vocab)
    assert made.sum(axis=1) + np.exp(entries.log_tail.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    assert len(np.unique(entries.positions * vocab + entries.ids)) == len(entries.ids)
    assert (entries.weights > 0).all()
    assert (entries.num_exact <= entries.counts).all()


@pytest.mark.parametrize("k", [1, 12, 300])
def test_topk_keeps_the_largest_and_the_exact_log_mass_of_the_rest(k: int) -> None:
    logits = oracle.logits(40, 1000)
    probs = oracle.probabilities(logits)
    entries = oracle.encoded(logits, TopK(k=k, layout="plain"))
    order = np.argsort(-probs, axis=1, kind="stable")
    assert (entries.ids.reshape(40, k) == order[:, :k]).all()
    assert entries.weights.reshape(40, k) == pytest.approx(
        np.take_along_axis(probs, order[:, :k], 1), rel=1e-5
    )
    rest = np.log(np.take_along_axis(probs, order[:, k:], 1).sum(axis=1))
    assert entries.log_tail == pytest.approx(rest, abs=1e-5)


def test_topk_takes_the_smaller_id_where_probabilities_are_equal() -> None:
    logits = torch.zeros(1, 600)
    logits[0, 500] = 1
    assert oracle.encoded(logits, TopK(k=3, layout="plain")).ids.tolist() == [500, 0, 1]


@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda codec: codec.name)
@pytest.mark.parametrize("shape", ["peaked", "flat", "typical"])
def test_sampled_weights_are_unbiased(codec: SparseCodec, shape: str) -> None:
    logits = {
        "peaked": torch.cat([torch.tensor([9.0, 5.0]), torch.zeros(60)]),
        "flat": torch.linspace(0, 0.5, 62),
        "typical": oracle.logits(1, 400, seed=3)[0],
    }[shape]
    target = oracle.probabilities(logits[None])[0]
    assert oracle.four_standard_errors(many_draws(logits, codec), target) < 1


def test_the_variance_of_sample_is_the_closed_form() -> None:
    """Trace variance (1 - |t|^2) / N, and expected distinct ids sum 1 - (1 - t)^N."""
    logits = oracle.logits(1, 400, seed=5)[0]
    target = oracle.probabilities(logits[None])[0]
    codec = Sample(draws=22, seed=1, layout="plain")
    weights = many_draws(logits, codec)
    trace = ((weights - target) ** 2).sum(axis=1)
    expected = (1 - (target**2).sum()) / 22
    assert abs(trace.mean() - expected) < 4 * trace.std() / np.sqrt(REPEATS)
    distinct = (weights > 0).sum(axis=1)
    assert abs(distinct.mean() - (1 - (1 - target) ** 22).sum()) < 4 * distinct.std() / np.sqrt(REPEATS)


def reference_head(target: np.ndarray, tau: float) -> tuple[int, int, float]:
    """(h, m, tau of the position) by the definition, one position at a time."""
    ordered = np.sort(target)[::-1]
    for head in range(len(ordered) + 1):
        rest = 1 - ordered[:head].sum()
        steps = max(1, round(rest / tau))
        if head == len(ordered) or steps == 1 or ordered[head] <= rest / steps * (1 - 1e-5):
            return head, steps, rest / steps
    raise AssertionError


@pytest.mark.parametrize("tau", [0.3, 0.07, 0.01])
def test_the_variance_of_threshold_is_the_closed_form(tau: float) -> None:
    """Trace variance sum over the tail of t (tau_pos - t)."""
    logits = oracle.logits(1, 400, seed=6)[0]
    target = oracle.probabilities(logits[None])[0]
    head, _, step = reference_head(target, tau)
    tail = np.sort(target)[::-1][head:]
    trace = ((many_draws(logits, Threshold(tau=tau, seed=2, layout="plain")) - target) ** 2).sum(axis=1)
    assert abs(trace.mean() - (tail * (step - tail)).sum()) < 4 * trace.std() / np.sqrt(REPEATS) + 1e-9


@pytest.mark.parametrize("tau", [0.5, 0.07, 0.004])
def test_threshold_keeps_the_head_exactly_and_each_sampled_id_weighs_the_step(tau: float) -> None:
    logits = oracle.logits(60, 700, seed=8)
    probs = oracle.probabilities(logits)
    entries = oracle.encoded(logits, Threshold(tau=tau, seed=0, layout="plain"))
    for position in range(60):
        head, steps, step = reference_head(probs[position], tau)
        own = slice(entries.offsets[position], entries.offsets[position + 1])
        assert entries.num_exact[position] == head
        assert entries.counts[position] == head + steps
        ids, weights = entries.ids[own], entries.weights[own]
        assert (ids[:head] == np.argsort(-probs[position], kind="stable")[:head]).all()
        assert weights[:head] == pytest.approx(probs[position][ids[:head]], rel=1e-5)
        assert weights[head:] == pytest.approx(step, rel=1e-4)
        assert (np.diff(ids[head:]) > 0).all()


def renormalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("wrong", ["sample then renormalise", "top of the sampled ids", "proposal t^0.8"])
def test_known_wrong_variants_fail_the_same_check(wrong: str) -> None:
    """What is published here and there, against the check that `sample` and `threshold` pass."""
    logits = oracle.logits(1, 400, seed=3)[0]
    target = oracle.probabilities(logits[None])[0]
    generator = np.random.default_rng(0)
    proposal = target**0.8 / (target**0.8).sum()
    drawn = generator.multinomial(22, proposal if wrong == "proposal t^0.8" else target, REPEATS)
    if wrong == "sample then renormalise":  # distinct ids keep their own probability, scaled to mass 1
        weights = renormalised((drawn > 0) * target)
    elif wrong == "top of the sampled ids":
        seen = np.where(drawn > 0, target, 0)
        least = np.sort(seen, axis=1)[:, -8][:, None]
        weights = renormalised(np.where(seen >= least, drawn, 0).astype(float))
    else:  # without importance weights it is biased; with them, its variance is larger
        weights = drawn / 22
        corrected = drawn / 22 * target / proposal
        trace = ((corrected - target) ** 2).sum(axis=1)
        assert trace.mean() > 1.04 * (1 - (target**2).sum()) / 22
    assert oracle.four_standard_errors(weights, target) > 1


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_entries_do_not_depend_on_batch_or_order(codec: SparseCodec) -> None:
    logits, keys = oracle.logits(90, 3000, seed=9), oracle.keys(90)
    whole = sparsify(logits, codec, keys)
    order = np.random.default_rng(0).permutation(90)
    shuffled = sparsify(logits[order], codec, Keys(keys.rows[order], keys.positions[order]))
    one_by_one = concatenate([sparsify(logits[i : i + 1], codec, keys.part(i, i + 1)) for i in range(90)])
    for other in (shuffled.take(np.argsort(order)), one_by_one):
        assert all((a == b).all() for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_padding_of_the_vocabulary_is_never_kept_and_never_counts(codec: SparseCodec) -> None:
    logits = oracle.logits(30, 500)
    padded = torch.cat([logits, torch.full((30, 12), 50.0)], dim=1)
    clean, cut = sparsify(logits, codec, oracle.keys(30)), sparsify(padded, codec, oracle.keys(30), 500)
    assert all((a == b).all() for a, b in zip(clean, cut, strict=True))


@given(
    st.integers(1, 600),
    st.sampled_from([1e-4, 0.01, 0.07, 0.5, 1.0]),
    st.integers(0, 2**31),
    st.floats(0.1, 60),
)
@settings(max_examples=60, deadline=None)
def test_threshold_holds_for_any_distribution(vocab: int, tau: float, seed: int, sharpness: float) -> None:
    """Peaked to one-hot, flat, tiny vocabularies: distinct ids, unit mass, never more entries than ids."""
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, sharpness, (8, vocab)).astype(np.float32))
    entries = oracle.encoded(logits, Threshold(tau=max(tau, 2**-15), seed=0, layout="plain"))
    assert len(np.unique(entries.positions * vocab + entries.ids)) == len(entries.ids)
    assert oracle.dense(entries, vocab).sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert entries.ids.min() >= 0
    assert entries.ids.max() < vocab
    assert (entries.counts <= vocab).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies_are_those_of_float64_also_where_ids_are_ruled_out(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (30 + 4 * torch.randn(7, 1000, generator=generator)).to(dtype)
    logits[2, ::3], logits[3, 1:] = -torch.inf, -torch.inf
    keys = Keys(counter_rng.row_words(["0" * 32] * 7), np.arange(7))
    entropy = sparsify_and_measure(logits, Threshold(tau=0.1, seed=0, layout="plain"), keys)[1]
    expected = torch.special.entr(torch.softmax(logits.double(), 1)).sum(1)
    assert entropy == pytest.approx(expected.numpy(), abs=1e-4)
    assert entropy[3] == 0
    logits[5, 4] = torch.nan
    with pytest.raises(NotFinite):
        sparsify_and_measure(logits, Threshold(tau=0.1, seed=0, layout="plain"), keys)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_equal_logits_and_bfloat16_are_no_special_cases(codec: SparseCodec) -> None:
    for logits in (torch.zeros(4, 300), torch.zeros(4, 256, dtype=torch.bfloat16), torch.full((4, 2), -1e4)):
        entries = oracle.encoded(logits, codec)
        made = oracle.dense(entries, logits.shape[1]).sum(axis=1) + np.exp(entries.log_tail)
        assert made == pytest.approx(1, abs=1e-5)
