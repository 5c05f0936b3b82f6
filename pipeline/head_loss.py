"""The loss of a vocabulary's head without the matrix of logits: one kernel for labels and entries.

For entries (ids, w) of a position with mass W = sum of w and logits x = h head^T + bias,

    loss = W LSE(x) - sum w x_ids        gradient in x: W softmax(x) - w

which is cross-entropy where one id has weight 1, and sum w log(w / p) up to a constant for sampled entries.
Positions are taken a chunk at a time: the chunk's logits are made, summed up in float32, turned into their
own gradient in place, and used for the gradients of states and head. Nothing of size [positions, V] exists
(after Wijmans et al. 2024, Cut your losses; Hsu et al. 2024, Liger kernels).

Shape letters: P positions, D width, V vocabulary, E entries, C positions of a chunk.
"""

from typing import Any

import torch

from pipeline.losses import SparseTargets

CHUNK_POSITIONS = 128


def head_loss(
    states_PD: torch.Tensor,
    head_VD: torch.Tensor,
    targets: SparseTargets,
    bias_V: torch.Tensor | None = None,
    chunk: int = CHUNK_POSITIONS,
) -> torch.Tensor:
    """sum over positions of W LSE(x) - sum w x_ids, in nats: a sum, for the caller to divide.

    Logits are computed in the dtype of `states_PD` and `head_VD`, sums over the vocabulary in float32.
    Positions without entries and entries of weight 0 add nothing. Gradients flow to states, head and bias.
    """
    ends = torch.searchsorted(targets.positions, torch.arange(len(states_PD) + 1, device=states_PD.device))
    loss: torch.Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        states_PD, head_VD, bias_V, targets.positions, targets.ids, targets.weights, ends, chunk
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    """Gradients are formed on the way forward, where the chunk's logits are, and scaled on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        states_PD: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        positions_E: torch.Tensor,
        ids_E: torch.Tensor,
        weights_E: torch.Tensor,
        ends: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        num, wide = len(states_PD), torch.promote_types(states_PD.dtype, torch.float32)
        grad_states = torch.empty_like(states_PD)
        grad_head = torch.zeros(head_VD.shape, dtype=wide, device=head_VD.device)
        grad_bias = None if bias_V is None else torch.zeros(bias_V.shape, dtype=wide, device=bias_V.device)
        total = states_PD.new_zeros((), dtype=wide)
        for start in range(0, num, chunk):
            stop = min(start + chunk, num)
            own = slice(int(ends[start]), int(ends[stop]))
            rows, ids, weights = positions_E[own] - start, ids_E[own], weights_E[own].to(wide)
            states = states_PD[start:stop]
            logits = (states @ head_VD.T).to(wide)  # the one matrix of a chunk; it becomes its own gradient
            if bias_V is not None:
                logits += bias_V
            mass_C = logits.new_zeros(stop - start).index_add_(0, rows, weights)
            sums_C = logits.logsumexp(1)
            total += (mass_C * sums_C).sum() - (weights * logits[rows, ids]).sum()
            logits.sub_(sums_C[:, None]).exp_().mul_(mass_C[:, None])
            logits.index_put_((rows, ids), -weights, accumulate=True)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            grad = logits.to(states.dtype)
            grad_states[start:stop] = grad @ head_VD
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
            None, None, None, None, None,
        )  # fmt: skip
