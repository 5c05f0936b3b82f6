"""Sentence embeddings: how a model makes one vector of a row, and the model that does it.

Shape letters: B batch, L tokens, W width of a vector.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import normalize

from pipeline.config.teachers import Embedding
from pipeline.losses.features import pool_states
from storage.errors import TeacherError
from storage.spec import EmbeddingSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MODULES = "modules.json"  # of sentence-transformers: the steps that a model is made of
STEPS = ("Transformer", "Pooling", "Normalize")


def embedding_spec(name: str, directory: Path, embedding: Embedding | None, width: int) -> EmbeddingSpec:
    """How the model in `directory` makes its vectors: by the entry, or by its modules.json.

    Raises TeacherError where neither has it, and for steps of sentence-transformers that are not supported.
    """
    if embedding is not None:
        return EmbeddingSpec(width=width, pool=embedding.pool, normalised=embedding.normalised)
    if not (directory / MODULES).is_file():
        raise TeacherError(
            f"teachers.{name}: {directory} has no {MODULES}, which defines how a row becomes one vector.\n"
            f"Write it: teachers.{name}.embedding: {{pool: mean, normalised: true}} (or pool: first)."
        )
    steps = json.loads((directory / MODULES).read_text())
    kinds = [step["type"].rsplit(".", 1)[-1] for step in steps]
    if kinds not in (list(STEPS[:2]), list(STEPS)):
        raise _unsupported(name, directory, f"the steps {kinds}", f"{list(STEPS)}, the last or not")
    found = json.loads((directory / steps[1]["path"] / "config.json").read_text())
    modes = [key for key, on in found.items() if key.startswith("pooling_mode") and on is True]
    pools: dict[str, Literal["first", "mean"]] = {
        "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"
    }  # fmt: skip
    if len(modes) != 1 or modes[0] not in pools:
        raise _unsupported(name, directory, f"the pooling {modes}", f"one of {list(pools)}")
    return EmbeddingSpec(width=width, pool=pools[modes[0]], normalised=len(steps) == len(STEPS))


class SentenceEncoder(torch.nn.Module):
    """A transformer that gives one vector a row."""

    def __init__(self, model: "PreTrainedModel", spec: EmbeddingSpec) -> None:
        super().__init__()
        self.model, self.config, self._spec = model, model.config, spec

    def forward(self, attention_mask: torch.Tensor, **inputs: Any) -> SimpleNamespace:
        """`logits`: vectors [B, W]; `hidden_states` where `output_hidden_states` is among the inputs."""
        out = self.model(attention_mask=attention_mask, **inputs)
        vectors_BW = pool_states(out.last_hidden_state.float(), attention_mask, self._spec.pool)
        return SimpleNamespace(
            logits=normalize(vectors_BW) if self._spec.normalised else vectors_BW,
            hidden_states=getattr(out, "hidden_states", None),
        )


def _unsupported(name: str, directory: Path, found: str, expected: str) -> TeacherError:
    return TeacherError(
        f"teachers.{name}: {directory / MODULES} makes vectors in a way that is not supported.\n"
        f"  found    {found}\n  expected {expected}\n"
        f"If the model can be used in another way, write it: teachers.{name}.embedding."
    )
