"""Student architectures: each takes the inputs that it lists in `reads`, and returns logits [B, C].

`input_ids` are int64 [B, L], padded on the right, and `attention_mask` is bool [B, L], true for tokens.
Padding never changes an answer.

Shape letters: B batch, L tokens, C classes, E embedding width, H hidden units, P numbers of an image.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from pipeline.config.students import (
    BiLSTMStudent,
    FCStudent,
    MLPStudent,
    TinyBERTStudent,
    TransformersStudent,
)
from pipeline.streaming.model_inputs import InputTensors, for_transformers, inputs_of
from pipeline.students.bert_weights import FEED_FORWARD_RATIO, MIN_POSITIONS
from pipeline.students.hf_config import build_network, student_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


EMBEDDING_STD = 0.1  # wide enough for the mean of embeddings to carry a signal from the first step


class FC(nn.Module):
    """Mean of embeddings, one hidden layer of ReLUs (a deep averaging network; Iyyer et al. 2015)."""

    reads = ("input_ids", "attention_mask")

    def __init__(self, entry: FCStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.embedding = _embedding(vocab_size, entry.embedding)
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


class BiLSTM(nn.Module):
    """One LSTM in each direction; max and mean over the row's tokens, then a linear layer (Tang et al. 2019).

    The backward LSTM reads each row reversed in place (its own last token first). So both see padding only
    after the row's end, and no packing is needed: on a CPU that is 1.3 times as fast as packed sequences.
    """

    reads = ("input_ids", "attention_mask")

    def __init__(self, entry: BiLSTMStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.embedding = _embedding(vocab_size, entry.embedding)
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


class StudentFeatures(NamedTuple):
    """The logits of a student, and the states that lead to them."""

    logits_BC: torch.Tensor
    states: tuple[torch.Tensor, ...]  # [B, L, W] behind the embeddings and behind each layer
    qkv: dict[int, torch.Tensor]  # layer (the first is 1) -> query, key, value side by side: [B, L, 3 W]


class TinyBERT(nn.Module):
    """A BERT of a few narrow layers from random weights (sizes as in Turc et al. 2019)."""

    reads = ("input_ids", "attention_mask")

    def __init__(self, entry: TinyBERTStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__()
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


class Transformers(nn.Module):
    """A classifier of transformers, as its config says; saved as transformers saves it."""

    reads = ("input_ids", "attention_mask")

    def __init__(self, entry: TransformersStudent, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.rebuild(student_config(entry, vocab_size, num_labels))

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


class MLP(nn.Module):
    """A perceptron over pixels, from 0 to 1."""

    reads = ("pixel_values",)

    def __init__(self, entry: MLPStudent, num_pixels: int, num_labels: int) -> None:
        super().__init__()
        self.layers = perceptron(num_pixels, entry.hidden, num_labels, entry.dropout)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of bytes [B, P]."""
        logits_BC: torch.Tensor = self.layers(pixel_values / 255)
        return logits_BC


class TaskHead(nn.Module):
    """A student of several tasks, as that of one of them.

    The output layer is linear: its rows for one task are a linear head of their own on what all tasks share.
    """

    def __init__(self, student: nn.Module, outputs: Sequence[int]) -> None:
        super().__init__()
        self.student = student
        self.start, self.end = outputs

    @property
    def reads(self) -> tuple[str, ...]:
        """The inputs that the student reads."""
        return inputs_of(self.student)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of the task."""
        logits_BC: torch.Tensor = self.student(**inputs)[:, self.start : self.end]
        return logits_BC


def perceptron(num_inputs: int, hidden: Sequence[int], num_outputs: int, dropout: float) -> nn.Sequential:
    """Linear layers with ReLUs and dropout between them."""
    layers: list[nn.Module] = []
    for before, width in zip((num_inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear((num_inputs, *hidden)[-1], num_outputs))


def _embedding(vocab_size: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(vocab_size, width)
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    return embedding
