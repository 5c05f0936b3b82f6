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

from pipeline.students.bert_weights import BERT_EMBEDDINGS, BERT_LAYER_PREFIX, BERT_POSITIONS, bert_tensors
from pipeline.students.llama_weights import WEIGHTS_FILE


def xavier(model: nn.Module) -> None:
    """Give all linear layers random weights by Glorot and Bengio (2010), uniform."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)


def initialise_embeddings(own_VW: torch.Tensor, weights: Path) -> None:
    """Write the teacher's embeddings into these, in fewer dimensions.

    `weights` is a cache's `weights_dir`. Ids of the student past the teacher's keep their random embeddings.
    """
    with safe_open(weights / WEIGHTS_FILE, "pt") as file:
        embeddings_VD = file.get_tensor(BERT_EMBEDDINGS)[: len(own_VW)].float()
    own_VW[: len(embeddings_VD)] = factorise_embeddings(embeddings_VD, own_VW.shape[1])


def factorise_embeddings(embeddings_VD: torch.Tensor, width: int) -> torch.Tensor:
    """U_m S_m [V, W] of the best matrix of rank W for these embeddings."""
    return embeddings_VD @ principal_axes(embeddings_VD, torch.ones(embeddings_VD.shape[1]), width)


def copy_bert_layers(bert: nn.Module, layers: tuple[int, ...], weights: Path) -> None:
    """Give a BERT classifier these layers of the teacher, in this order, its embeddings and its head."""
    held = bert.state_dict()
    with safe_open(weights / WEIGHTS_FILE, "pt") as file:
        for name in bert_tensors(range(len(layers))):
            source = name
            if name.startswith(BERT_LAYER_PREFIX):
                place, part = name.removeprefix(BERT_LAYER_PREFIX).split(".", 1)
                source = f"{BERT_LAYER_PREFIX}{layers[int(place)]}.{part}"
            tensor = file.get_tensor(source).float()
            if name in (BERT_EMBEDDINGS, BERT_POSITIONS):
                own = held[name].clone()
                num = min(len(own), len(tensor))
                own[:num] = tensor[:num]
                tensor = own
            held[name] = tensor
    bert.load_state_dict(held)


ROWS = 8192  # of embeddings, in float64 at a time


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
