"""What a teacher reads of rows, and which positions have a target of their own.

A classifier of rows has none, a classifier of tokens one for each, a causal language model one for each but a
row's last. A masked language model reads each row with some tokens hidden, and has targets for these alone.
Which ones is a function of (seed, row id, position): the same in whatever batch, shard or capture. A chosen
token is always replaced by the mask, never left as it was or exchanged for another (Devlin et al. 2019 do so
to a fifth of them, for models that will later read text without masks; a target needs no such care).
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

MASKING = 2  # the stream of random numbers: those of a codec with the same seed must not depend on it
ROWS_AT_ONCE = 4096  # of random numbers in memory


class Prompts(NamedTuple):
    """What a teacher reads of N rows, token by token."""

    tokens: Tokens  # with masks, where there are any
    asked: npt.NDArray[np.bool_]  # of each token: whether its position has a target


def make_prompts(
    task: Task, mask: Mask | None, tokens: Tokens, row_ids: pa.StringArray, special: Mapping[str, int]
) -> Prompts:
    """What a teacher of this task reads of these rows. `special`: ids of the tokenizer's special tokens.

    Raises TeacherError where there is a mask, and the tokenizer has no token for it.
    """
    if mask is not None:
        return _masked(mask, tokens, row_ids, special)
    asked = np.full(len(tokens.ids), TASKS[task].stored.per_position)
    if TASKS[task].predicts_next:
        asked[tokens.offsets[1:] - 1] = False
    return Prompts(tokens, asked)


def _masked(mask: Mask, tokens: Tokens, row_ids: pa.StringArray, special: Mapping[str, int]) -> Prompts:
    """The rows with a share of their tokens (rounded, at least one; never special ones) behind the mask."""
    if "mask_token" not in special:
        raise TeacherError(
            "the tokenizer has no mask_token in its tokenizer_config.json, and a masked language model "
            "needs one.\n"
            "Take the tokenizer that the model was made with."
        )
    asked = np.zeros(len(tokens.ids), bool)
    open_ = ~np.isin(tokens.ids, list(special.values()))
    for start in range(0, len(row_ids), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(row_ids)))
        lengths = tokens.lengths[rows]
        first, owners = tokens.offsets[start], np.repeat(np.arange(len(rows)), lengths)
        words = counter_rng.row_words(row_ids.take(pa.array(rows)).to_pylist())
        places = ranges(np.zeros(len(rows), np.int64), lengths)
        drawn = counter_rng.uniforms(mask.seed, words[owners], places, 1, MASKING)[:, 0]
        own = open_[first : first + len(owners)]
        drawn[~own] = 2  # behind all others
        num_open = np.bincount(owners, own, minlength=len(rows))
        num_masked = np.minimum(np.maximum(np.rint(mask.share * num_open), 1), num_open).astype(np.int64)
        order = np.lexsort((drawn, owners))
        asked[first + order[ranges(ends(lengths)[:-1], num_masked)]] = True
    hidden = np.where(asked, np.int32(special["mask_token"]), tokens.ids)
    return Prompts(tokens._replace(ids=hidden), asked)
