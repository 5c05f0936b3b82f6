"""The loss of a vocabulary's head without the matrix of logits: one kernel for labels and entries.

For entries (ids, w) of a position with mass W = sum of w and logits x = h head^T + bias,

    loss = W LSE(x) - sum w x_ids        gradient in x: W softmax(x) - w

which is cross-entropy where one id has weight 1, and sum w log(w / p) up to a constant for sampled entries.
For top-k entries the ids that were left out are one more bucket (losses.sparse.bucket_kl at temperature 1):
b is the student's mass on the kept ids and a the teacher's:

    loss = -sum w log p_ids - (1 - a) log(1 - b)         gradient p - w on them, p (a - b) / (1 - b) off them

Positions are taken a chunk at a time: the chunk's logits are made, summed up in float32, turned into their
own gradient in place, and used for the gradients of states and head. Nothing of size [positions, V] exists
(after Wijmans et al. 2024, Cut your losses; Hsu et al. 2024, Liger kernels).

Shape letters: P positions, D width, V vocabulary, E entries, C positions of a chunk.
"""

from typing import Any

import torch

from pipeline.losses.sparse import SparseTargets

CHUNK_POSITIONS = 128


def head_loss(
    states_PD: torch.Tensor,
    head_VD: torch.Tensor,
    targets: SparseTargets,
    bias_V: torch.Tensor | None = None,
    chunk: int = CHUNK_POSITIONS,
    bucket: bool = False,
) -> torch.Tensor:
    """sum over positions of the loss above, in nats: a sum, for the caller to divide.

    Logits are computed in the dtype of `states_PD` and `head_VD`, sums over the vocabulary in float32.
    Positions without entries and entries of weight 0 add nothing; with `bucket`, ids of a position must be
    distinct. Gradients flow to states, head and bias.
    """
    ends = torch.searchsorted(targets.positions, torch.arange(len(states_PD) + 1, device=states_PD.device))
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        states_PD, head_VD, bias_V, targets, ends, chunk, bucket
    )
    return loss


def mix_labels(labels_P: torch.Tensor, targets: SparseTargets, alpha: float) -> SparseTargets:
    """The entries whose `head_loss` is alpha CE + (1 - alpha) that of `targets`: one pass over the head.

    Every position has a label. Without a bucket the loss is linear in the weights, so labels are entries too.
    """
    positions = torch.arange(len(labels_P), device=labels_P.device)
    if alpha == 1:
        ones = torch.ones_like(positions, dtype=targets.weights.dtype)
        return SparseTargets(positions, labels_P, ones, torch.full_like(targets.log_tail, -torch.inf))
    if alpha == 0:
        return targets
    both = torch.cat([targets.positions, positions])
    order = torch.argsort(both, stable=True)
    share = targets.weights.new_full((len(labels_P),), alpha)
    weights = torch.cat([(1 - alpha) * targets.weights, share])
    ids = torch.cat([targets.ids, labels_P])
    return SparseTargets(both[order], ids[order], weights[order], targets.log_tail)


class _HeadLoss(torch.autograd.Function):
    """Gradients are formed on the way forward, where the chunk's logits are, and scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        states_PD: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets: SparseTargets,
        ends: torch.Tensor,
        chunk: int,
        bucket: bool,
    ) -> torch.Tensor:
        num, wide = len(states_PD), torch.promote_types(states_PD.dtype, torch.float32)
        grad_states = torch.empty_like(states_PD)
        grad_head = torch.zeros(head_VD.shape, dtype=wide, device=head_VD.device)
        grad_bias = None if bias_V is None else torch.zeros(bias_V.shape, dtype=wide, device=bias_V.device)
        total = states_PD.new_zeros((), dtype=wide)
        for start in range(0, num, chunk):
            stop = min(start + chunk, num)
            own = slice(int(ends[start]), int(ends[stop]))
            rows, ids = targets.positions[own] - start, targets.ids[own]
            weights = targets.weights[own].to(wide)
            states = states_PD[start:stop]
            logits = (states @ head_VD.T).to(wide)  # the one matrix of a chunk; it becomes its own gradient
            if bias_V is not None:
                logits += bias_V
            mass_C = logits.new_zeros(stop - start).index_add_(0, rows, weights)
            total -= (weights * logits[rows, ids]).sum()
            largest_C = logits.amax(1)
            exps = logits.sub_(largest_C[:, None]).exp_()  # one pass of exponentials, in place
            sums_C = exps.sum(1)
            total += (mass_C * (largest_C + sums_C.log())).sum()
            if bucket:
                tail_C = targets.log_tail[start:stop].to(wide).exp() * (mass_C > 0)
                probs = exps.div_(sums_C[:, None])
                total += _to_bucket_gradient(probs, rows, ids, mass_C, tail_C)
            else:
                exps.mul_((mass_C / sums_C)[:, None])
            logits.index_put_((rows, ids), -weights, accumulate=True)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            grad = logits.to(states.dtype)
            grad_states[start:stop] = grad @ head_VD
            if grad.dtype == wide:
                grad_head.addmm_(grad.T, states)  # in place: no second [V, D]
            else:
                grad_head += grad.T @ states
        ctx.save_for_backward(grad_states, grad_head, *([] if grad_bias is None else [grad_bias]))
        ctx.dtypes = head_VD.dtype, None if bias_V is None else bias_V.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (scale,) = grads
        states, head, *bias = ctx.saved_tensors
        head_dtype, bias_dtype = ctx.dtypes
        return (
            states * scale.to(states.dtype),
            (head * scale).to(head_dtype),
            (bias[0] * scale).to(bias_dtype) if bias else None,
            None, None, None, None,
        )  # fmt: skip


def _to_bucket_gradient(
    probs_CV: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, mass_C: torch.Tensor, tail_C: torch.Tensor
) -> torch.Tensor:
    """Turn probabilities into the bucket's gradient, in place, but for the kept ids' own -w; return what the
    tail adds to the loss.

    Off the kept ids p (a - b) / (1 - b) = p (1 - (1 - a) / (1 - b)). 1 - b is summed, not subtracted: it can
    be far below 1.
    """
    kept = probs_CV[rows, ids]
    probs_CV[rows, ids] = 0
    others_C = probs_CV.sum(1).clamp(min=torch.finfo(probs_CV.dtype).tiny)
    whole_C = mass_C + tail_C  # 1, up to the rounding of the codec
    probs_CV.mul_((whole_C - tail_C / others_C)[:, None])
    probs_CV[rows, ids] = kept * whole_C[rows]
    return -(tail_C * others_C.log()).sum()
