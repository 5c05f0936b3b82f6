"""How far a student's hidden states are from its teacher's: pure functions of tensors, and their registry.

Positions are true tokens alone. States come one after the other, [T, W]; what compares the tokens of a row
with each other takes rows, [B, L, W], and the mask of true tokens. Layers, projections and weights are in
training/feature_matching.py.

Shape letters: T positions or pooled rows, W the teacher's width, D the student's, B rows, L tokens, H heads,
d width of a head, X three widths: query, key and value side by side.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import cosine_similarity, kl_div, mse_loss

from storage.spec import QKV_PARTS

Pooling = Literal["first", "mean", "none"]


def pool_states(states_BLW: torch.Tensor, mask_BL: torch.Tensor, pool: Pooling) -> torch.Tensor:
    """One state a row [B, W]: first: its first token's; mean: the mean of its true tokens'. none: the states
    of all true tokens, row after row [T, W].
    """
    if pool == "none":
        return states_BLW[mask_BL]
    if pool == "first":
        return states_BLW[:, 0]
    weight_BL1 = mask_BL[..., None].to(states_BLW.dtype)
    return (states_BLW * weight_BL1).sum(1) / weight_BL1.sum(1)


def state_mse(student_TW: torch.Tensor, teacher_TW: torch.Tensor) -> torch.Tensor:
    """Mean over positions and dimensions of (s - t)^2, in squared units of the states.

    TinyBERT (Jiao et al. 2020, equations 8 and 9): s is the student's state times a learned matrix, for the
    outputs of layers, and with another matrix for the embeddings.
    """
    return mse_loss(student_TW, teacher_TW)


def state_cosine(student_TW: torch.Tensor, teacher_TW: torch.Tensor) -> torch.Tensor:
    """Mean over positions of 1 - cos(s, t): 0 to 2.

    DistilBERT (Sanh et al. 2019, section 3), of the last states. Patient distillation (Sun et al. 2019,
    section 3) has |s / |s| - t / |t||^2 of the first token's states: that is exactly twice this.
    """
    return (1 - cosine_similarity(student_TW, teacher_TW, dim=-1)).mean()


def score_mse(
    student_BLX: torch.Tensor, teacher_BLX: torch.Tensor, mask_BL: torch.Tensor, heads: int
) -> torch.Tensor:
    """Mean over heads and pairs of true tokens of the squared difference of attention scores Q K^T / sqrt(d).

    TinyBERT (Jiao et al. 2020, equation 7): scores before the softmax, head i of the student against head i
    of the teacher. Arguments are query, key and value side by side, [B, L, 3 D] and [B, L, 3 W], each cut
    into `heads`.
    """
    student_BHLL, teacher_BHLL = (
        _products(parts[0], parts[1], heads) for parts in (_parts(student_BLX), _parts(teacher_BLX))
    )
    pairs_B1LL = (mask_BL[:, :, None] & mask_BL[:, None, :])[:, None]
    squares = ((student_BHLL - teacher_BHLL) ** 2).masked_fill(~pairs_B1LL, 0)
    return squares.sum() / (heads * pairs_B1LL.sum())


def relation_kl(
    student_BLX: torch.Tensor, teacher_BLX: torch.Tensor, mask_BL: torch.Tensor, heads: int
) -> torch.Tensor:
    """The sum over A in (query, key, value) of KL(R_t || R_s) in nats, mean over heads and positions.

    R = softmax(A A^T / sqrt(d)) over the row's true tokens, after A was cut into `heads` relation heads: any
    number that divides both widths, so neither widths nor attention heads need be alike. MiniLMv2 (Wang et
    al. 2021, section 3, all three weights 1). Arguments as for `score_mse`.
    """
    hidden_B11L = ~mask_BL[:, None, None, :]
    total = student_BLX.new_zeros(())
    for student_part, teacher_part in zip(_parts(student_BLX), _parts(teacher_BLX), strict=True):
        lowest = torch.finfo(student_part.dtype).min / 2  # not -inf: its gradient would be NaN
        student_logs, teacher_logs = (
            _products(part, part, heads).masked_fill(hidden_B11L, lowest).log_softmax(-1)
            for part in (student_part, teacher_part)
        )
        kl_BHL = kl_div(student_logs, teacher_logs, log_target=True, reduction="none").sum(-1)
        total = total + kl_BHL.masked_fill(~mask_BL[:, None], 0).sum()
    return total / (heads * mask_BL.sum())


class FeaturePair(NamedTuple):
    """What is compared: pooled rows or true tokens [T, W], or rows of query, key and value [B, L, X]."""

    student: torch.Tensor
    teacher: torch.Tensor
    mask_BL: torch.Tensor


STATE_LOSSES = {"mse": state_mse, "cosine": state_cosine}
# The loss of each part of `match`, by name. The second argument is its section (config/match.py).
FEATURE_LOSSES: dict[str, Callable[[FeaturePair, Any], torch.Tensor]] = {
    "states": lambda pair, part: STATE_LOSSES[part.loss](pair.student, pair.teacher),
    "embeddings": lambda pair, part: state_mse(pair.student, pair.teacher),
    "attention": lambda pair, part: score_mse(*pair, part.heads),
    "relations": lambda pair, part: relation_kl(*pair, part.heads),
}


def unflatten_rows(flat_TW: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Vectors of true tokens, row after row, at their places: [B, L, W], zeros at padding."""
    rows_BLW = flat_TW.new_zeros(*mask_BL.shape, flat_TW.shape[-1])
    rows_BLW[mask_BL] = flat_TW
    return rows_BLW


def _parts(vectors_BLX: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return vectors_BLX.chunk(QKV_PARTS, dim=-1)


def _products(left_BLW: torch.Tensor, right_BLW: torch.Tensor, heads: int) -> torch.Tensor:
    """left right^T / sqrt(d) within each head: [B, H, L, L]."""
    left, right = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (left_BLW, right_BLW))
    products: torch.Tensor = left @ right.mT / left.shape[-1] ** 0.5
    return products
