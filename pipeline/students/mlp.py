"""Student of kind `mlp`: layers of ReLUs over all numbers of an image.

Shape letters: B batch, P numbers of an image, C classes.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.config.students import MLPStudent
from pipeline.students.base import StudentModel


class MLP(StudentModel):
    """A perceptron over pixels, from 0 to 1."""

    def __init__(self, entry: MLPStudent, num_pixels: int, num_labels: int) -> None:
        super().__init__(entry)
        self.layers = perceptron(num_pixels, entry.hidden, num_labels, entry.dropout)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of bytes [B, P]."""
        logits_BC: torch.Tensor = self.layers(pixel_values / 255)
        return logits_BC


def perceptron(num_inputs: int, hidden: Sequence[int], num_outputs: int, dropout: float) -> nn.Sequential:
    """Linear layers with ReLUs and dropout between them."""
    layers: list[nn.Module] = []
    for before, width in zip((num_inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear((num_inputs, *hidden)[-1], num_outputs))
