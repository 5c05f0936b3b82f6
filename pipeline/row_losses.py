"""Losses of rows whose numbers are no logits of one class: several labels, values, vectors.

    loss = alpha labels + (1 - alpha) soft      as in losses.py; a part with weight 0 is not computed

Every mean is over rows and over the numbers of a row. Rows without labels (nan) count in the soft part alone.

Shape letters: B rows, C labels (or numbers, or the width of a vector).
"""

from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, logsigmoid, mse_loss

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SoftLoss = Callable[[torch.Tensor, torch.Tensor, float, str], torch.Tensor]


def labels_entropy(said_BC: torch.Tensor, truth_BC: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each label's sigmoid in nats; 0, with a gradient of 0, where no row has any."""
    return _labelled(binary_cross_entropy_with_logits, said_BC, truth_BC)


def squared_error(said_BC: torch.Tensor, truth_BC: torch.Tensor) -> torch.Tensor:
    """Mean squared error; 0, with a gradient of 0, where no row has numbers."""
    return _labelled(mse_loss, said_BC, truth_BC)


def no_labels(said_BC: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """0: there is nothing to learn from but the teacher."""
    return 0 * said_BC.sum()


def binary_kl(
    said_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0, divergence: str = "forward"
) -> torch.Tensor:
    """T^2 KL(Bern(sigmoid(teacher / T)) || Bern(sigmoid(student / T))) in nats, mean over rows and labels.

    T^2 is that of Hinton et al. 2015 (section 2); each label is a classifier of two classes.
    """
    said, wanted = said_BC / temperature, teacher_BC / temperature
    kl = wanted.sigmoid() * (logsigmoid(wanted) - logsigmoid(said))
    kl = kl + (-wanted).sigmoid() * (logsigmoid(-wanted) - logsigmoid(-said))
    return temperature**2 * kl.mean()


def value_loss(
    said_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0, divergence: str = "mse"
) -> torch.Tensor:
    """Mean squared error to the teacher's numbers."""
    return mse_loss(said_BC, teacher_BC)


def vector_loss(
    said_BC: torch.Tensor, teacher_BC: torch.Tensor, temperature: float = 1.0, divergence: str = "cosine"
) -> torch.Tensor:
    """cosine: 1 - cos(student, teacher), mean over rows. mse: squared error (Reimers and Gurevych 2020)."""
    if divergence == "mse":
        return mse_loss(said_BC, teacher_BC)
    return (1 - cosine_similarity(said_BC, teacher_BC, dim=-1)).mean()


def mix(label_loss: Loss, soft_loss: SoftLoss) -> Callable[..., torch.Tensor]:
    """alpha labels + (1 - alpha) soft, with the arguments of losses.recipe_loss."""

    def loss(
        said_BC: torch.Tensor,
        labels: torch.Tensor,
        teacher_BC: torch.Tensor,
        alpha: float,
        temperature: float,
        divergence: str,
        skew: float = 0.1,
        sampled: bool = False,
    ) -> torch.Tensor:
        if alpha == 1:
            return label_loss(said_BC, labels)
        soft = (1 - alpha) * soft_loss(said_BC, teacher_BC, temperature, divergence)
        return soft if alpha == 0 else alpha * label_loss(said_BC, labels) + soft

    return loss


def _labelled(loss: Loss, said_BC: torch.Tensor, truth_BC: torch.Tensor) -> torch.Tensor:
    there_B = ~truth_BC.isnan().any(-1)
    return loss(said_BC[there_B], truth_BC[there_B]) if there_B.any() else 0 * said_BC.sum()
