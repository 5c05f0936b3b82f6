"""What a student is: a module with the inputs that it reads, its first weights and its files.

To add a kind: its section with the facts (config/students.py), a `StudentModel` in a module of this room, and
its line in registry.py.

Shape letters: B batch, L tokens, C classes, D width of a state, W the same of hidden states, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from pipeline.config.students import StudentSection
from pipeline.streaming.model_inputs import InputTensors, inputs_of

EMBEDDING_STD = 0.1  # wide enough for the mean of embeddings to carry a signal from the first step


class StudentFeatures(NamedTuple):
    """The logits of a student, and the states that lead to them."""

    logits_BC: torch.Tensor
    states: tuple[torch.Tensor, ...]  # [B, L, W] after the embeddings and after each layer
    qkv: dict[int, torch.Tensor]  # layer (the first is 1) -> query, key, value side by side: [B, L, 3 W]


class Outputs(NamedTuple):
    """What a student reads and returns, besides its sizes."""

    num_ids: int  # of the vocabulary; of images: numbers of an image
    labels: tuple[str, ...]  # names of its outputs, in order
    pad_id: int


class StudentModel(nn.Module):
    """A student. Its constructor takes (entry, vocabulary size, number of outputs) and makes random weights.

    Forward takes the inputs in `reads`, by name (`input_ids` int64 [B, L], padded on the right;
    `attention_mask` bool [B, L], true for tokens; `pixel_values` uint8 [B, numbers of an image]), and returns
    logits [B, C]; see LanguageModelStudent for those that return states. Padding never changes an output.
    """

    file_metadata: ClassVar[dict[str, str] | None] = None  # of model.safetensors

    def __init__(self, entry: StudentSection) -> None:
        super().__init__()
        self.reads = entry.reads

    @property
    def stored(self) -> nn.Module:
        """The module whose tensors model.safetensors has."""
        return self

    def configure(self, entry: Any, outputs: Outputs) -> None:
        """Take what the entry does not have; called once, before training, with random weights."""

    def initialise(self, entry: Any, weights: Path | None) -> None:
        """Take the first weights that the entry's `init` names.

        `weights` is a cache's `weights_dir`, None where the cache has no weights. That the two fit was
        checked (training/checks.py).
        """
        raise NotImplementedError(f"{type(self).__name__} has no other first weights")

    def save_settings(self, directory: Path) -> None:
        """Write the files that the student needs besides model.safetensors and student.json."""

    def load_settings(self, directory: Path) -> None:
        """Be what these files describe, before weights are loaded."""

    def features(self, inputs: InputTensors, layers: Iterable[int] = ()) -> StudentFeatures:
        """The logits with the states of all layers, and the query, key and value of these ones. Of kinds that
        are `matchable`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no features to match")


class LanguageModelStudent(StudentModel):
    """A student that predicts the next token: its forward returns states [B, L, D]."""

    @property
    def head(self) -> torch.Tensor:
        """The matrix [V, D] that turns states into logits."""
        raise NotImplementedError

    def next_logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The logits [V] of the token after one row of ids [1, L]."""
        logits_V: torch.Tensor = self(input_ids=ids_BL)[0, -1] @ self.head.T
        return logits_V


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


def random_embedding(vocab_size: int, width: int) -> nn.Embedding:
    """Embeddings from a normal distribution."""
    embedding = nn.Embedding(vocab_size, width)
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    return embedding
