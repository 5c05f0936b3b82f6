"""First weights of students of texts: a teacher's layers, its embeddings in fewer dimensions, or Xavier's.

The best matrix of rank m for the teacher's embeddings E = U S V^T is U_m S_m V_m^T (Eckart and Young 1936):
what it misses, in squares, is the sum of the squares of the singular values past m. The student gets its rows
in the axes V_m, U_m S_m = E V_m: as long as they were but for what is missed, and at the same angles.

Shape letters: V vocabulary, D the teacher's width, W the student's.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from pipeline import kinds, students
from pipeline.decoders import FILE
from pipeline.encoders import EMBEDDINGS, LAYER_PREFIX, POSITIONS, EncoderStart, tensor_names
from pipeline.initialise import principal_axes


def begin(model: nn.Module, entry: kinds.FC | kinds.BiLSTM | kinds.TinyBERT, weights: Path | None) -> None:
    """Give `model`, built from `entry`, the first weights that `entry.init` says.

    `weights` is a cache's `weights_dir`, where init needs it; that the two fit is known
    (encoders.refuse_misfit). Ids of the student past the teacher's keep their random embeddings.
    """
    init = entry.init
    if isinstance(init, EncoderStart) and init.xavier:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
    if isinstance(init, EncoderStart) and init.layers is not None:
        assert isinstance(model, students.TinyBERT)
        assert weights is not None
        _copy_layers(model, init.layers, weights)
    elif init is not None and init.embeddings:
        assert weights is not None
        own_VW = _embeddings(model)
        with safe_open(weights / FILE, "pt") as file:
            embeddings_VD = file.get_tensor(EMBEDDINGS)[: len(own_VW)].float()
        own_VW[: len(embeddings_VD)] = factorised(embeddings_VD, own_VW.shape[1])


def factorised(embeddings_VD: torch.Tensor, width: int) -> torch.Tensor:
    """U_m S_m [V, W] of the best matrix of rank W for these embeddings."""
    return embeddings_VD @ principal_axes(embeddings_VD, torch.ones(embeddings_VD.shape[1]), width)


def _embeddings(model: nn.Module) -> torch.Tensor:
    where = "bert.bert.embeddings.word_embeddings" if isinstance(model, students.TinyBERT) else "embedding"
    return model.get_parameter(f"{where}.weight").data


def _copy_layers(model: students.TinyBERT, layers: tuple[int, ...], weights: Path) -> None:
    held = model.bert.state_dict()
    with safe_open(weights / FILE, "pt") as file:
        for name in tensor_names(range(len(layers))):
            source = name
            if name.startswith(LAYER_PREFIX):
                place, part = name.removeprefix(LAYER_PREFIX).split(".", 1)
                source = f"{LAYER_PREFIX}{layers[int(place)]}.{part}"
            tensor = file.get_tensor(source).float()
            if name in (EMBEDDINGS, POSITIONS):
                own = held[name].clone()
                num = min(len(own), len(tensor))
                own[:num] = tensor[:num]
                tensor = own
            held[name] = tensor
    model.bert.load_state_dict(held)
