"""Student of kind `tinybert`: a BERT of a few narrow layers, whose states can be matched.

Shape letters: B batch, L tokens, C classes, W width.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from pipeline.config.students import TinyBERTStudent
from pipeline.streaming.model_inputs import InputTensors, for_transformers
from pipeline.students.base import StudentFeatures, StudentModel
from pipeline.students.bert_weights import FEED_FORWARD_RATIO, MIN_POSITIONS
from pipeline.students.initialise import copy_bert_layers, initialise_embeddings, xavier


class TinyBERT(StudentModel):
    """A BERT of a few narrow layers from random weights (sizes as in Turc et al. 2019)."""

    def __init__(self, entry: TinyBERTStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__(entry)
        from transformers import (
            BertConfig,
            BertForSequenceClassification,
        )  # seconds to import; the others need none

        self.bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=entry.width,
                num_hidden_layers=entry.layers,
                num_attention_heads=entry.heads,
                intermediate_size=FEED_FORWARD_RATIO * entry.width,
                hidden_dropout_prob=entry.dropout,
                attention_probs_dropout_prob=0.0,  # keeps the fused attention kernel on a CPU
                max_position_embeddings=max(entry.max_length, MIN_POSITIONS),
                num_labels=num_labels,
            )
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits_BC: torch.Tensor = self.bert(**for_transformers(inputs)).logits
        return logits_BC

    def features(self, inputs: InputTensors, layers: Iterable[int] = ()) -> StudentFeatures:
        """The same logits with the states of all layers, and the query, key and value of these ones."""
        parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

        def keep(layer: int) -> Callable[[nn.Module, object, torch.Tensor], None]:
            return lambda module, inputs, output: parts[layer].append(output)

        blocks = {layer: self.bert.bert.encoder.layer[layer - 1].attention.self for layer in parts}
        hooks = [
            linear.register_forward_hook(keep(layer))
            for layer, block in blocks.items()
            for linear in (block.query, block.key, block.value)
        ]
        try:
            read = for_transformers({name: inputs[name] for name in self.reads})
            out = self.bert(**read, output_hidden_states=True)
        finally:
            for hook in hooks:
                hook.remove()
        qkv = {layer: torch.cat(found, -1) for layer, found in parts.items()}
        return StudentFeatures(out.logits, out.hidden_states, qkv)

    def initialise(self, entry: TinyBERTStudent, weights: Path | None) -> None:
        """See StudentModel."""
        assert entry.init is not None
        if entry.init.xavier:
            xavier(self)
        if entry.init.layers is not None:
            assert weights is not None
            copy_bert_layers(self.bert, entry.init.layers, weights)
        elif entry.init.embeddings:
            assert weights is not None
            initialise_embeddings(self.bert.get_input_embeddings().weight.data, weights)
