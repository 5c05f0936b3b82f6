"""A student's first weights from its teacher's: chosen layers, copied, or projected to a smaller width.

Projection is SliceGPT's (Ashkboos et al. 2024, section 3). An RMSNorm commutes with rotations once its weight
is folded into the linear maps that read it. So the residual stream x can be kept as y = s Q^T x with columns
of Q orthonormal: embeddings and what blocks write are multiplied by s Q^T, maps that read by Q / s. With
s = sqrt(W / D) the mean of y^2 over W is that of x^2 over D wherever x lies in the span of Q. So norms divide
by the same number, eps counts as much as it did, and the student computes what the teacher does. (SliceGPT
has no s; it divides the sum of squares by D in a norm of its own.) Where the span misses a part of x, norms
make up for its length, and the maps behind them still read numbers of the size that they know.

The student's head is tied to its embeddings, so the weight g of the final norm cannot be folded. Of the
weights that the student's final norm can have, (D / W) sum_i g_i Q_iw^2 is the best: the least squares of
E Q diag(.) Q^T against E diag(g). It is exact where Q mixes dimensions of one g only. Language models have a
few dimensions with large states and a g of their own; so these are not rotated (`principal_axes`).

A teacher's head that is not tied is left behind: its embeddings must be the student's, since both ends of the
student are one matrix, and the layers read embeddings.

Shape letters: V vocabulary, D the teacher's width, W the student's, F width inside feed-forward blocks.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from pipeline import kinds, students
from pipeline.decoders import (
    BLOCKS,
    EMBEDDINGS,
    FILE,
    NORM,
    PARTS,
    choose_heads,
    refuse_misfit,
    sizes,
    tensor_name,
)

# What a model's numbers mean beyond its weights. Positions belong to rope: some kinds scale by their maximum.
SETTINGS = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "hidden_act")
ROWS = 8192  # of embeddings, in float64 at a time

Tensors = dict[str, torch.Tensor]


def from_teacher(model: students.Llama, entry: kinds.Llama, weights: Path) -> None:
    """Give `model`, built from `entry`, the teacher's weights that `entry.init` names.

    `weights` is a cache's `weights_dir`. Ids of the student past the teacher's keep their random embeddings.
    Where sizes are the teacher's, tensors are copied. Raises SpecMismatch where the two do not fit.
    """
    from transformers import LlamaConfig

    assert entry.init is not None
    with safe_open(weights / FILE, "pt") as file:
        layers = {int(name.split(".")[2]) for name in set(file.keys()) if name.startswith("model.layers.")}
        refuse_misfit("the student", entry, weights, sorted(layers))
        tensors = {name: file.get_tensor(name).float() for name in (EMBEDDINGS, NORM)}
        for place, layer in enumerate(entry.init.layers):
            for part in PARTS:
                tensors[tensor_name(place, part)] = file.get_tensor(tensor_name(layer, part)).float()
    own_VW = model.head.detach().clone()
    tensors[EMBEDDINGS] = tensors[EMBEDDINGS][: len(own_VW)]
    for place in range(entry.layers):
        _keep_heads(tensors, place, entry, weights)
        _keep_neurons(tensors, place, entry.inner_width)
    if entry.width < len(tensors[NORM]):
        axes_DW = principal_axes(tensors[EMBEDDINGS], tensors[NORM], entry.width)
        tensors = project(tensors, axes_DW, entry.layers)
    own_VW[: len(tensors[EMBEDDINGS])] = tensors[EMBEDDINGS]
    settings, teacher = model.model.config, LlamaConfig.from_pretrained(weights)
    for name in SETTINGS:
        setattr(settings, name, getattr(teacher, name))
    model.rebuild(settings)
    model.load_state_dict({**tensors, EMBEDDINGS: own_VW})


def principal_axes(embeddings_VD: torch.Tensor, norm_D: torch.Tensor, width: int) -> torch.Tensor:
    """Orthonormal columns [D, W] that keep most of the embeddings (their second moments' eigenvectors).

    Dimensions whose weight in the final norm is off the median by more than half of it come first, each as a
    column of its own: see above.
    """
    middle = norm_D.median()
    away_D = (norm_D - middle).abs()
    farthest = away_D.argsort(descending=True, stable=True)[:width]
    alone = farthest[away_D[farthest] > middle.abs() / 2]
    mixed = torch.ones(len(norm_D), dtype=torch.bool)
    mixed[alone] = False
    moments = torch.zeros(2 * [int(mixed.sum())], dtype=torch.float64)
    for start in range(0, len(embeddings_VD), ROWS):
        part = embeddings_VD[start : start + ROWS, mixed].double()
        moments += part.T @ part
    _, vectors = torch.linalg.eigh(moments)  # the largest last
    axes_DW = torch.zeros(len(norm_D), width, dtype=torch.float64)
    axes_DW[alone, torch.arange(len(alone))] = 1
    axes_DW[mixed, len(alone) :] = vectors.flip(1)[:, : width - len(alone)]
    return axes_DW.float()


def project(tensors: Tensors, axes_DW: torch.Tensor, num_layers: int) -> Tensors:
    """The same model, norms folded, with its residual stream in the span of these orthonormal columns."""
    width = axes_DW.shape[1]
    scale = (width / len(axes_DW)) ** 0.5
    made = {
        EMBEDDINGS: tensors[EMBEDDINGS] @ axes_DW * scale,
        NORM: (axes_DW**2).T @ tensors[NORM] / scale**2,
    }
    for place in range(num_layers):
        for block in BLOCKS:
            norm = tensor_name(place, block.norm)
            made[norm] = torch.ones(width)
            for part in block.readers:
                name = tensor_name(place, part)
                made[name] = tensors[name] * tensors[norm] @ axes_DW / scale
            name = tensor_name(place, block.writer)
            made[name] = scale * axes_DW.T @ tensors[name]
    return made


def _keep_heads(tensors: Tensors, place: int, entry: kinds.Llama, weights: Path) -> None:
    """Leave the heads that the student takes in a layer's attention."""
    teacher = sizes(weights)
    heads = choose_heads(entry.heads, entry.num_kv_heads, teacher)
    for part, chosen in (("q_proj", heads.query), ("k_proj", heads.kv), ("v_proj", heads.kv)):
        name = tensor_name(place, f"self_attn.{part}")
        by_head = tensors[name].view(-1, teacher.head_width, teacher.width)
        tensors[name] = by_head[chosen].view(-1, teacher.width)
    name = tensor_name(place, "self_attn.o_proj")
    by_head = tensors[name].view(teacher.width, -1, teacher.head_width)
    tensors[name] = by_head[:, heads.query].view(teacher.width, -1)


def _keep_neurons(tensors: Tensors, place: int, num: int) -> None:
    """Leave the `num` neurons of a layer's feed-forward block that can say most, in their order.

    That is the product of the norms of what a neuron reads with (gate, up) and writes with (down).
    """
    block = BLOCKS[1]
    norm, down = tensors[tensor_name(place, block.norm)], tensor_name(place, block.writer)
    readers = [tensor_name(place, part) for part in block.readers]
    say_F = tensors[down].norm(dim=0)
    for name in readers:
        say_F = say_F * (tensors[name] * norm).norm(dim=1)
    kept = say_F.topk(num).indices.sort().values
    for name in readers:
        tensors[name] = tensors[name][kept]
    tensors[down] = tensors[down][:, kept]
