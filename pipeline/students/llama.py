"""A student's first weights from its teacher's: chosen layers, copied, or projected to a smaller width.

Projection is SliceGPT's (Ashkboos et al. 2024, section 3). An RMSNorm commutes with rotations once its weight
is folded into the linear maps that read it. So the residual stream x can be kept as y = s Q^T x with columns
of Q orthonormal: embeddings and what blocks write are multiplied by s Q^T, maps that read by Q / s. With
s = sqrt(W / D) the mean of y^2 over W is that of x^2 over D wherever x is in the span of Q. So norms divide
by the same number, eps counts as much as it did, and the student computes what the teacher does. (SliceGPT
has no s; it divides the sum of squares by D in a norm of its own.) Where the span misses a part of x, norms
make up for its length, and the maps after them still read numbers of the size that they expect.

The student's head is tied to its embeddings, so the weight g of the final norm cannot be folded. Of the
weights that the student's final norm can have, (D / W) sum_i g_i Q_iw^2 is the best: the least squares of
E Q diag(.) Q^T against E diag(g). It is exact where Q mixes dimensions of one g only. Language models have a
few dimensions with large states and a g of their own; so these are not rotated (`principal_axes`).

A teacher's head that is not tied is left behind: its embeddings must be the student's, since both ends of the
student are one matrix, and the layers read embeddings.

Shape letters: V vocabulary, D the teacher's width, W the student's, F width inside feed-forward blocks.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from pipeline.config.students import LlamaStudent
from pipeline.students.base import LanguageModelStudent
from pipeline.students.initialise import principal_axes
from pipeline.students.llama_weights import (
    FINAL_NORM,
    HALF_LAYERS,
    LAYER_PARTS,
    LLAMA_EMBEDDINGS,
    WEIGHTS_FILE,
    check_llama_start,
    choose_heads,
    llama_tensor,
    teacher_sizes,
)

if TYPE_CHECKING:
    from transformers import LlamaConfig


# What a model's numbers mean beyond its weights. Positions belong to rope: some kinds scale by their maximum.
KEPT_SETTINGS = ("rope_parameters", "max_position_embeddings", "rms_norm_eps", "hidden_act")

Tensors = dict[str, torch.Tensor]


class Llama(LanguageModelStudent):
    """A small Llama from random weights (Touvron et al. 2023), its head tied to its embeddings.

    Its tensors are named as those of transformers' LlamaForCausalLM, and `save` writes that model's
    config.json too: what is saved is a checkpoint that transformers loads.
    """

    def __init__(self, entry: LlamaStudent, vocab_size: int, num_labels: int = 0) -> None:
        super().__init__(entry)
        from transformers import LlamaConfig

        self.rebuild(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=entry.width,
                intermediate_size=entry.inner_width,
                num_hidden_layers=entry.layers,
                num_attention_heads=entry.heads,
                num_key_value_heads=entry.num_kv_heads,
                max_position_embeddings=entry.max_length,
                attention_dropout=entry.dropout,
                tie_word_embeddings=True,
                architectures=["LlamaForCausalLM"],
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def rebuild(self, settings: "LlamaConfig") -> None:
        """Have random weights, of these settings."""
        from transformers import LlamaModel

        self.model = LlamaModel(settings)

    def initialise(self, entry: LlamaStudent, weights: Path | None) -> None:
        """See StudentModel."""
        assert weights is not None
        initialise_llama(self, entry, weights)

    def save_settings(self, directory: Path) -> None:
        """Write config.json, as transformers does."""
        self.model.config.save_pretrained(directory)

    def load_settings(self, directory: Path) -> None:
        """See StudentModel: a teacher may have decided settings that are not in the entry."""
        from transformers import LlamaConfig

        self.rebuild(LlamaConfig.from_pretrained(directory))

    @property
    def head(self) -> torch.Tensor:
        """What turns states into logits: [V, D]."""
        weight: torch.Tensor = self.model.embed_tokens.weight
        return weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """States [B, L, D] that the head would read. Padding is on the right: no token attends to it."""
        states_BLD: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return states_BLD


def initialise_llama(model: Llama, entry: LlamaStudent, weights: Path) -> None:
    """Give `model`, built from `entry`, the teacher's weights that `entry.init` names.

    `weights` is a cache's `weights_dir`. Ids of the student past the teacher's keep their random embeddings.
    Where sizes are the teacher's, tensors are copied. Raises SpecMismatch where the two do not fit.
    """
    from transformers import LlamaConfig

    assert entry.init is not None
    with safe_open(weights / WEIGHTS_FILE, "pt") as file:
        layers = {int(name.split(".")[2]) for name in set(file.keys()) if name.startswith("model.layers.")}
        check_llama_start("the student", entry, weights, sorted(layers))
        tensors = {name: file.get_tensor(name).float() for name in (LLAMA_EMBEDDINGS, FINAL_NORM)}
        for place, layer in enumerate(entry.init.layers):
            for part in LAYER_PARTS:
                tensors[llama_tensor(place, part)] = file.get_tensor(llama_tensor(layer, part)).float()
    own_VW = model.head.detach().clone()
    tensors[LLAMA_EMBEDDINGS] = tensors[LLAMA_EMBEDDINGS][: len(own_VW)]
    for place in range(entry.layers):
        _keep_heads(tensors, place, entry, weights)
        _keep_neurons(tensors, place, entry.inner_width)
    if entry.width < len(tensors[FINAL_NORM]):
        axes_DW = principal_axes(tensors[LLAMA_EMBEDDINGS], tensors[FINAL_NORM], entry.width)
        tensors = project_llama(tensors, axes_DW, entry.layers)
    own_VW[: len(tensors[LLAMA_EMBEDDINGS])] = tensors[LLAMA_EMBEDDINGS]
    settings, teacher = model.model.config, LlamaConfig.from_pretrained(weights)
    for name in KEPT_SETTINGS:
        setattr(settings, name, getattr(teacher, name))
    model.rebuild(settings)
    model.load_state_dict({**tensors, LLAMA_EMBEDDINGS: own_VW})


def project_llama(tensors: Tensors, axes_DW: torch.Tensor, num_layers: int) -> Tensors:
    """The same model, norms folded, with its residual stream in the span of these orthonormal columns."""
    width = axes_DW.shape[1]
    scale = (width / len(axes_DW)) ** 0.5
    made = {
        LLAMA_EMBEDDINGS: tensors[LLAMA_EMBEDDINGS] @ axes_DW * scale,
        FINAL_NORM: (axes_DW**2).T @ tensors[FINAL_NORM] / scale**2,
    }
    for place in range(num_layers):
        for block in HALF_LAYERS:
            norm = llama_tensor(place, block.norm)
            made[norm] = torch.ones(width)
            for part in block.readers:
                name = llama_tensor(place, part)
                made[name] = tensors[name] * tensors[norm] @ axes_DW / scale
            name = llama_tensor(place, block.writer)
            made[name] = scale * axes_DW.T @ tensors[name]
    return made


def _keep_heads(tensors: Tensors, place: int, entry: LlamaStudent, weights: Path) -> None:
    """Leave the heads that the student takes in a layer's attention."""
    teacher = teacher_sizes(weights)
    heads = choose_heads(entry.heads, entry.num_kv_heads, teacher)
    for part, chosen in (("q_proj", heads.query), ("k_proj", heads.kv), ("v_proj", heads.kv)):
        name = llama_tensor(place, f"self_attn.{part}")
        by_head = tensors[name].view(-1, teacher.head_width, teacher.width)
        tensors[name] = by_head[chosen].view(-1, teacher.width)
    name = llama_tensor(place, "self_attn.o_proj")
    by_head = tensors[name].view(teacher.width, -1, teacher.head_width)
    tensors[name] = by_head[:, heads.query].view(teacher.width, -1)


def _keep_neurons(tensors: Tensors, place: int, num: int) -> None:
    """Leave the `num` neurons of a layer's feed-forward block that can say most, in their order.

    That is the product of the norms of what a neuron reads with (gate, up) and writes with (down).
    """
    block = HALF_LAYERS[1]
    norm, down = tensors[llama_tensor(place, block.norm)], llama_tensor(place, block.writer)
    readers = [llama_tensor(place, part) for part in block.readers]
    say_F = tensors[down].norm(dim=0)
    for name in readers:
        say_F = say_F * (tensors[name] * norm).norm(dim=1)
    kept = say_F.topk(num).indices.sort().values
    for name in readers:
        tensors[name] = tensors[name][kept]
    tensors[down] = tensors[down][:, kept]
