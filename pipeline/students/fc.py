"""Student of kind `fc`: mean of embeddings, then one hidden layer.

Shape letters: B batch, L tokens, C classes, E embedding width.
"""

from pathlib import Path

import torch
from torch import nn

from pipeline.config.students import FCStudent
from pipeline.students.base import StudentModel, random_embedding
from pipeline.students.initialise import initialise_embeddings


class FC(StudentModel):
    """Mean of embeddings, one hidden layer of ReLUs (a deep averaging network; Iyyer et al. 2015)."""

    def __init__(self, entry: FCStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__(entry)
        self.embedding = random_embedding(vocab_size, entry.embedding)
        self.head = nn.Sequential(
            nn.Dropout(entry.dropout),
            nn.Linear(entry.embedding, entry.hidden),
            nn.ReLU(),
            nn.Dropout(entry.dropout),
            nn.Linear(entry.hidden, num_labels),
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        weight_BL1 = attention_mask[..., None].to(self.embedding.weight.dtype)
        mean_BE = (self.embedding(input_ids) * weight_BL1).sum(1) / weight_BL1.sum(1)
        logits_BC: torch.Tensor = self.head(mean_BE)
        return logits_BC

    def initialise(self, entry: FCStudent, weights: Path | None) -> None:
        """See StudentModel."""
        assert weights is not None
        initialise_embeddings(self.embedding.weight.data, weights)
