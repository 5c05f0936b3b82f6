"""The compact layout: ids come back to the bit, weights within the error that the format promises."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import compact
from storage.codecs import Sample, SparseCodec, Threshold, TopK
from storage.compact import HEAD_LEVELS, Ranks
from storage.entries import Entries, ends

TABLE = "0" * 64
VOCABULARIES = [2, 257, 65_536, 131_073, 262_144, 2**31 - 1]
I64 = npt.NDArray[np.int64]


def codec(name: str, **settings: int | float) -> SparseCodec:
    made = {"topk": TopK, "sample": Sample, "threshold": Threshold}[name]
    return made(layout="compact", ranks=TABLE, **settings)  # type: ignore[return-value]


def some_ranks(vocab: int, seed: int = 0) -> Ranks:
    """A table of at most 65,536 frequent ids, in no order."""
    generator = np.random.default_rng(seed)
    frequent = (
        generator.integers(0, vocab, min(vocab, 3000)) if vocab > 3000 else generator.permutation(vocab)
    )
    return Ranks(generator.permutation(np.unique(frequent)), vocab)


def sampled(sets: list[list[int]], draws: int = 50) -> Entries:
    """Entries of the codec `sample`: each id drawn once, the first of a position for all that is left."""
    counts = np.array([len(ids) for ids in sets])
    weights = [
        w
        for ids in sets
        for w in ([(draws - len(ids) + 1) / draws] + [1 / draws] * (len(ids) - 1) if ids else [])
    ]
    none = np.full(len(sets), -np.inf, np.float32)
    flat = np.array([i for ids in sets for i in ids], np.int32)
    return Entries(ends(counts), flat, np.array(weights, np.float32), np.zeros(len(sets), np.int32), none)


def round_trip(code: SparseCodec, entries: Entries, ranks: Ranks, seed: int = 0) -> Entries:
    noise = np.random.default_rng(seed).random(int(entries.num_exact.sum()))
    return code.unpack(code.pack(entries, ranks, noise), ranks)


def by_id(entries: Entries) -> list[list[tuple[int, float]]]:
    """(id, weight) of each position, by id."""
    pairs = list(zip(entries.ids.tolist(), entries.weights.tolist(), strict=True))
    bounds = zip(entries.offsets[:-1], entries.offsets[1:], strict=True)
    return [sorted(pairs[start:end]) for start, end in bounds]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_ranks_are_a_permutation_of_the_vocabulary(vocab: int) -> None:
    ranks = some_ranks(vocab)
    ids = np.unique(np.random.default_rng(1).integers(0, vocab, 5000))
    ids = np.unique(np.concatenate([ids, ranks.frequent[:50], [0, vocab - 1]]))
    assert (ranks.id(ranks.rank(ids)) == ids).all()
    assert (ranks.rank(ranks.frequent) == np.arange(len(ranks.frequent))).all()
    assert ranks.rank(ids).max() < vocab


def test_the_dense_table_and_the_search_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, ids = some_ranks(70_000), np.arange(70_000)
    dense = ranks.rank(ids)
    monkeypatch.setattr(compact, "DENSE_TABLE", 0)
    assert (ranks.rank(ids) == dense).all()
    assert (ranks.id(dense) == ids).all()


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_ids_are_lossless_for_adversarial_sets(vocab: int) -> None:
    most = min(vocab, 40)
    sets = [
        [],
        [0],
        [vocab - 1],
        [0, vocab - 1],
        list(range(most)),
        list(range(vocab - most, vocab)),
        [],
        [int(i) for i in np.linspace(0, vocab - 1, most)],
        list(range(0, vocab, max(1, vocab // most)))[::-1],
        [],
    ]
    entries = sampled([list(dict.fromkeys(ids)) for ids in sets])
    for ranks in (some_ranks(vocab), Ranks(np.zeros(0, np.int64), vocab)):
        assert by_id(round_trip(codec("sample", draws=50, seed=0), entries, ranks)) == by_id(entries)


@given(st.data(), st.sampled_from(VOCABULARIES))
@settings(max_examples=60, deadline=None)
def test_ids_are_lossless_for_any_sets(data: st.DataObject, vocab: int) -> None:
    ids = st.lists(st.integers(0, vocab - 1), max_size=min(vocab, 30), unique=True)
    entries = sampled(data.draw(st.lists(ids, min_size=1, max_size=8)))
    assert by_id(round_trip(codec("sample", draws=50, seed=0), entries, some_ranks(vocab))) == by_id(entries)


def threshold_entries(heads: list[list[float]], tails: list[int], vocab: int = 1000) -> Entries:
    """Entries of the codec `threshold`: these exact weights, and this many sampled ids for the rest."""
    counts = np.array([len(head) + tail for head, tail in zip(heads, tails, strict=True)])
    weights, ids = [], []
    generator = np.random.default_rng(0)
    for head, tail in zip(heads, tails, strict=True):
        weights += [*head, *([(1 - sum(head)) / tail] * tail if tail else [])]
        ids += generator.choice(vocab, len(head) + tail, replace=False).tolist()
    exact = np.array([len(head) for head in heads], np.int32)
    none = np.full(len(heads), -np.inf, np.float32)
    return Entries(ends(counts), np.array(ids, np.int32), np.array(weights, np.float32), exact, none)


ADVERSARIAL = threshold_entries(
    [[1.0], [1 - 1e-7], [0.999, 0.0009], [0.5, 0.5], [0.25] * 4, [], [0.05] * 10, [2**-14, 0.9], [], [0.3]],
    [0, 1, 1, 0, 0, 14, 7, 1, 1, 3],
)


def test_shares_keep_unit_mass_and_stay_within_a_step() -> None:
    step = np.pi / 2 / HEAD_LEVELS  # in the arcsine of the square root, where the grid is even
    for seed in range(50):
        back = round_trip(codec("threshold", tau=0.07, seed=0), ADVERSARIAL, some_ranks(1000), seed)
        wanted = by_id(ADVERSARIAL)
        found = by_id(back)
        for want, got in zip(wanted, found, strict=True):
            assert [i for i, _ in want] == [i for i, _ in got]
            assert sum(weight for _, weight in got) == pytest.approx(1, abs=1e-6)
            assert all(weight >= 0 for _, weight in got)
        largest = [max(w for _, w in pairs) for pairs in found]
        assert largest[0] == 1.0
        assert abs(np.arcsin(np.sqrt(largest[9])) - np.arcsin(np.sqrt(0.3))) <= step + 1e-9


def test_shares_are_unbiased() -> None:
    """The mean over roundings is the weight, for heads and for what is left to the tail."""
    heads = [[0.31, 0.22, 0.11], [0.9, 0.05], [0.6]]
    one = threshold_entries(heads, [4, 1, 2])
    repeats = 4000
    many = one.take(np.tile(np.arange(3), repeats))
    back = round_trip(codec("threshold", tau=0.07, seed=0), many, some_ranks(1000))
    weights = np.array([[w for _, w in pairs] for pairs in by_id(back)], dtype=object).reshape(repeats, 3)
    for position, pairs in enumerate(by_id(one)):
        found = np.array(weights[:, position].tolist())
        error = found.std(axis=0, ddof=1) / np.sqrt(repeats)
        assert (np.abs(found.mean(axis=0) - [w for _, w in pairs]) < 4 * error + 1e-6).all()
        assert found.std(axis=0).max() > 0


def test_rounding_to_the_nearest_code_would_be_biased() -> None:
    """The guard: without noise the same check fails."""
    one = threshold_entries([[0.31, 0.22, 0.11]], [4])
    code, ranks = codec("threshold", tau=0.07, seed=0), some_ranks(1000)
    nearest = code.unpack(code.pack(one, ranks, np.full(3, 0.5)), ranks)
    worst = max(abs(a[1] - b[1]) for a, b in zip(by_id(one)[0], by_id(nearest)[0], strict=True))
    assert worst > 1e-3


@given(
    st.lists(st.floats(2**-15, 1), min_size=1, max_size=20),
    st.integers(1, 30),
    st.integers(0, 9),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_any_head_comes_back_with_unit_mass(raw: list[float], tail: int, seed: int, whole: bool) -> None:
    head = np.array(raw) / np.sum(raw) * (1 if whole else 0.97)
    entries = threshold_entries([head.tolist()], [0 if whole else tail])
    back = round_trip(codec("threshold", tau=0.07, seed=0), entries, some_ranks(1000), seed)
    assert sorted(back.ids.tolist()) == sorted(entries.ids.tolist())
    assert back.weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert (back.weights >= 0).all()


def topk_entries(probs: npt.NDArray[np.float64], k: int) -> Entries:
    """The k largest of each row of probabilities."""
    order = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(probs, order, 1)
    counts = np.full(len(probs), k)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - kept.sum(axis=1), 0))
    return Entries(
        ends(counts), order.reshape(-1).astype(np.int32), kept.reshape(-1).astype(np.float32),
        counts.astype(np.int32), tail.astype(np.float32),
    )  # fmt: skip


@pytest.mark.parametrize("shape", ["typical", "flat", "one-hot", "steep", "tiny tail"])
def test_topk_codes_lose_less_than_a_thousandth_of_a_nat(shape: str) -> None:
    """KL of the decoded targets against the exact ones, tail included, for distributions made to hurt."""
    vocab, k = 400, 64
    logits = {
        "typical": np.random.default_rng(0).normal(0, 3, (50, vocab)),
        "flat": np.zeros((50, vocab)),
        "one-hot": np.where(np.arange(vocab) == 7, 40.0, 0.0)[None].repeat(50, 0),
        "steep": -np.arange(vocab)[None] * np.linspace(0.02, 2, 50)[:, None],
        "tiny tail": np.where(np.arange(vocab) < k, 9.0, -9.0)[None].repeat(50, 0),
    }[shape]
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    entries = topk_entries(probs, k)
    back = round_trip(codec("topk", k=k), entries, some_ranks(vocab))
    exact, coded = by_id(entries), by_id(back)
    for position, (want, got) in enumerate(zip(exact, coded, strict=True)):
        assert [i for i, _ in want] == [i for i, _ in got]
        t = np.array([w for _, w in want] + [np.exp(entries.log_tail[position])], np.float64)
        q = np.array([w for _, w in got] + [np.exp(back.log_tail[position])], np.float64)
        assert q.sum() == pytest.approx(1, abs=1e-5)
        here = t > 1e-9
        assert (t[here] * np.log(t[here] / np.maximum(q[here], 1e-12))).sum() < 1.2e-3
