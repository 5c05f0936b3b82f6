"""Which positions of a row have a target of their own, and which tokens a masked language model does not see.

Rows of a classifier have one target for the whole row. A token classifier has one for each token, a causal
language model one for each token but a row's last. A masked language model reads each row with some tokens
masked, and has targets for these alone. Which ones is a function of (seed, row id, position): the same in
every batch, shard and capture. A chosen token is always replaced by the mask token, never kept or replaced by
another (Devlin et al. 2019 do so for a fifth of them, for models that will later read text without masks; a
target does not need it).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.config.tasks import TASKS
from pipeline.data import counter_rng
from pipeline.data.tokenizer import Tokens
from storage.entries import ends, ranges
from storage.errors import TeacherError
from storage.spec import Mask
from storage.tasks import Task

MASKING = 2  # stream of random numbers, apart from those that a codec draws with the same seed
ROWS_AT_ONCE = 4096  # limits the random numbers in memory


class TeacherTokens(NamedTuple):
    """N rows as a teacher of text reads them, and which of their positions have a target."""

    tokens: Tokens  # with masks, where the spec has some
    has_target: npt.NDArray[np.bool_]  # of each token: whether its position has a target of its own


def teacher_tokens(
    task: Task, mask: Mask | None, tokens: Tokens, row_ids: pa.StringArray, special: Mapping[str, int]
) -> TeacherTokens:
    """These rows as a teacher of this task reads them. `special`: ids of the tokenizer's special tokens.

    Raises TeacherError where there is a mask and the tokenizer does not have a mask token.
    """
    if mask is not None:
        return _masked(mask, tokens, row_ids, special)
    has_target = np.full(len(tokens.ids), TASKS[task].stored.per_position)
    if TASKS[task].predicts_next:
        has_target[tokens.offsets[1:] - 1] = False
    return TeacherTokens(tokens, has_target)


def _masked(mask: Mask, tokens: Tokens, row_ids: pa.StringArray, special: Mapping[str, int]) -> TeacherTokens:
    """The rows with a share of their tokens masked: rounded, at least one, never special tokens."""
    if "mask_token" not in special:
        raise TeacherError(
            "the tokenizer has no mask_token in its tokenizer_config.json, and a masked language model "
            "needs one.\n"
            "Take the tokenizer that the model was made with."
        )
    has_target = np.zeros(len(tokens.ids), bool)
    open_ = ~np.isin(tokens.ids, list(special.values()))
    for start in range(0, len(row_ids), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(row_ids)))
        lengths = tokens.lengths[rows]
        first, owners = tokens.offsets[start], np.repeat(np.arange(len(rows)), lengths)
        words = counter_rng.row_words(row_ids.take(pa.array(rows)).to_pylist())
        places = ranges(np.zeros(len(rows), np.int64), lengths)
        drawn = counter_rng.uniforms(mask.seed, words[owners], places, 1, MASKING)[:, 0]
        own = open_[first : first + len(owners)]
        drawn[~own] = 2  # special tokens sort after all others
        num_open = np.bincount(owners, own, minlength=len(rows))
        num_masked = np.minimum(np.maximum(np.rint(mask.share * num_open), 1), num_open).astype(np.int64)
        order = np.lexsort((drawn, owners))
        has_target[first + order[ranges(ends(lengths)[:-1], num_masked)]] = True
    hidden = np.where(has_target, np.int32(special["mask_token"]), tokens.ids)
    return TeacherTokens(tokens._replace(ids=hidden), has_target)
