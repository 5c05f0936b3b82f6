"""What has a target, and what is masked: a function of seed, row and position alone."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import counter_rng
from pipeline.data.tokenizer import Tokens
from pipeline.engines import masking
from pipeline.engines.masking import TeacherTokens, teacher_tokens
from storage.entries import ends
from storage.errors import TeacherError
from storage.spec import Mask
from tests.pipeline.oracle import row_name

SPECIAL = {"pad_token": 0, "unk_token": 1, "cls_token": 2, "sep_token": 3, "mask_token": 4}
ROWS = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=12)


def tokens(rows: list[list[int]]) -> Tokens:
    return Tokens(np.array([i for row in rows for i in row], np.int32), ends([len(row) for row in rows]), 0)


def masked(
    rows: list[list[int]], share: float = 0.15, seed: int = 0, names: list[int] | None = None
) -> TeacherTokens:
    """These rows as they are read, row `i` being called `names[i]`."""
    ids = pa.array([row_name(i) for i in (range(len(rows)) if names is None else names)])
    return teacher_tokens("masked-lm", Mask(share=share, seed=seed), tokens(rows), ids, SPECIAL)


def by_row(found: TeacherTokens) -> list[list[bool]]:
    return [part.tolist() for part in np.split(found.has_target, found.tokens.offsets[1:-1])]


@given(ROWS, st.floats(0.01, 1), st.integers(0, 3))
def test_a_share_of_the_tokens_that_are_not_special_is_masked(
    rows: list[list[int]], share: float, seed: int
) -> None:
    found = masked(rows, share, seed)
    for row, has_target in zip(rows, by_row(found), strict=True):
        num_open = sum(i > 4 for i in row)
        assert sum(has_target) == min(num_open, max(1, round(share * num_open)))
        assert not any(a for a, i in zip(has_target, row, strict=True) if i <= 4)
    before = tokens(rows).ids
    assert (found.tokens.ids == np.where(found.has_target, SPECIAL["mask_token"], before)).all()
    assert (before != SPECIAL["mask_token"])[found.has_target].all()


@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_what_is_masked_does_not_depend_on_the_other_rows(
    rows: list[list[int]], order: "st.randoms", at_once: int
) -> None:
    expected = by_row(masked(rows))
    names = list(range(len(rows)))
    order.shuffle(names)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "ROWS_AT_ONCE", at_once)
        found = by_row(masked([rows[name] for name in names], names=names))
    assert found == [expected[name] for name in names]


def test_rows_and_seeds_have_masks_of_their_own_and_every_position_its_share() -> None:
    rows = [list(range(10, 30))] * 2000
    found, other = np.array(by_row(masked(rows))), np.array(by_row(masked(rows, seed=1)))
    assert (found != other).any(1).mean() > 0.99
    assert len({tuple(row) for row in found.tolist()}) > 800
    error = np.sqrt(0.15 * 0.85 / 2000)
    assert np.abs(found.mean(0) - 0.15).max() < 4 * error


def test_what_a_codec_draws_at_a_masked_position_does_not_know_that_it_was_chosen() -> None:
    """A codec of the same seed uses numbers of another stream: the smallest would bias its targets."""
    rows = [list(range(10, 30))] * 500
    found = masked(rows)
    owners, places = np.nonzero(np.array(by_row(found)))
    words = counter_rng.row_words([row_name(row) for row in owners])
    drawn = counter_rng.uniforms(0, words, places, 1)[:, 0]
    assert abs(drawn.mean() - 0.5) < 4 * np.sqrt(1 / 12 / len(drawn))


@pytest.mark.parametrize(
    ("task", "has_target"),
    [
        ("sequence-classification", [0, 0, 0, 0]),
        ("token-classification", [1, 1, 1, 1]),
        ("causal-lm", [1, 1, 0, 0]),
    ],
)
def test_other_tasks_read_what_there_is(task: str, has_target: list[int]) -> None:
    rows = tokens([[5, 6, 7], [8]])
    found = teacher_tokens(task, None, rows, pa.array([row_name(0), row_name(1)]), SPECIAL)  # type: ignore[arg-type]
    assert found.has_target.tolist() == [bool(a) for a in has_target]
    assert found.tokens is rows


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    with pytest.raises(TeacherError, match="no mask_token"):
        teacher_tokens("masked-lm", Mask(share=0.1, seed=0), tokens([[5]]), pa.array([row_name(0)]), {})
