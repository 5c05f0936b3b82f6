"""Student of kind `transformers`: any sequence classifier of the library, by its config.

Shape letters: B batch, L tokens, C classes.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.config.students import TransformersStudent
from pipeline.streaming.model_inputs import for_transformers
from pipeline.students.base import Outputs, StudentModel
from pipeline.students.hf_config import build_network, check_padding, student_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Transformers(StudentModel):
    """A sequence classifier of transformers with this config; saved as transformers saves it."""

    file_metadata = {"format": "pt"}  # noqa: RUF012 (never changed)

    def __init__(self, entry: TransformersStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__(entry)
        self.rebuild(student_config(entry, vocab_size, num_labels))

    @property
    def stored(self) -> nn.Module:
        """The classifier: its file is the one that transformers writes."""
        return self.net

    def configure(self, entry: TransformersStudent, outputs: Outputs) -> None:
        """See StudentModel. Raises ConfigError where padding changes logits."""
        num_ids, labels, pad_id = outputs
        self.rebuild(student_config(entry, num_ids, self.settings.num_labels, pad_id, labels))
        check_padding(self, entry, num_ids)

    def save_settings(self, directory: Path) -> None:
        """Write config.json, as transformers does."""
        self.settings.save_pretrained(directory)

    def load_settings(self, directory: Path) -> None:
        """See StudentModel."""
        from transformers import AutoConfig

        self.rebuild(AutoConfig.from_pretrained(directory, trust_remote_code=False))

    def rebuild(self, settings: "PreTrainedConfig") -> None:
        """Have random weights, of these settings."""
        self.settings = settings
        self.net = build_network(settings)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        # Some architectures look for the last true token by the padding id.
        input_ids = input_ids.masked_fill(~attention_mask, self.settings.pad_token_id)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits_BC: torch.Tensor = self.net(**for_transformers(inputs)).logits
        return logits_BC
