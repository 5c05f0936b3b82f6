"""Student of kind `bilstm`: one LSTM in each direction, pooled by maximum and mean.

Shape letters: B batch, L tokens, C classes, E embedding width, H hidden units.
"""

from pathlib import Path

import torch
from torch import nn

from pipeline.config.students import BiLSTMStudent
from pipeline.students.base import StudentModel, random_embedding
from pipeline.students.initialise import initialise_embeddings


class BiLSTM(StudentModel):
    """One LSTM in each direction; max and mean over the row's tokens, then a linear layer (Tang et al. 2019).

    The backward LSTM reads each row reversed in place (its own last token first). So both see padding only
    after the row's end, and no packing is needed: on a CPU that is 1.3 times as fast as packed sequences.
    """

    def __init__(self, entry: BiLSTMStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__(entry)
        self.embedding = random_embedding(vocab_size, entry.embedding)
        self.forwards = nn.LSTM(entry.embedding, entry.hidden, batch_first=True)
        self.backwards = nn.LSTM(entry.embedding, entry.hidden, batch_first=True)
        self.dropout = nn.Dropout(entry.dropout)
        self.head = nn.Linear(4 * entry.hidden, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        lengths_B = attention_mask.sum(1)
        place_L = torch.arange(input_ids.shape[1], device=input_ids.device)
        mirror_BL = (lengths_B[:, None] - 1 - place_L).clamp(min=0)
        embedded_BLE = self.dropout(self.embedding(input_ids))
        there_BLH, _ = self.forwards(embedded_BLE)
        reversed_BLE = embedded_BLE.gather(1, mirror_BL[..., None].expand_as(embedded_BLE))
        back_BLH, _ = self.backwards(reversed_BLE)  # its order along L does not matter to max and mean
        states = torch.cat([there_BLH, back_BLH], dim=-1)
        mask_BL1 = attention_mask[..., None]
        most = states.masked_fill(~mask_BL1, float("-inf")).amax(1)
        mean = (states * mask_BL1).sum(1) / lengths_B[:, None]
        logits_BC: torch.Tensor = self.head(self.dropout(torch.cat([most, mean], dim=-1)))
        return logits_BC

    def initialise(self, entry: BiLSTMStudent, weights: Path | None) -> None:
        """See StudentModel."""
        assert weights is not None
        initialise_embeddings(self.embedding.weight.data, weights)
