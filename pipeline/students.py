"""Student architectures, and the files they are kept in.

Each is a module whose forward takes ids [B, L] (`MLP`: pixels) and the mask of true tokens [B, L], padded on
the right, and returns logits [B, C]; a language model (`Llama`) returns states [B, L, D], and its logits are
states times `head`. Padding never changes an answer. A saved student is a directory with model.safetensors
and student.json (its entry of params.yaml, vocabulary (of `mlp`: numbers of an image) and classes; of several
tasks also `heads`, which outputs belong to which); the tokenizer lies beside it, once for all seeds.

Shape letters: B batch, L tokens, C classes, E embedding width, H hidden units, P numbers of an image.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import by_config, kinds
from pipeline.encoders import INNER, LEAST_POSITIONS
from storage.errors import AssetError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig

EMBEDDING_STD = 0.1  # wide enough for the mean of embeddings to carry a signal from the first step


class FC(nn.Module):
    """Mean of embeddings, one hidden layer of ReLUs (a deep averaging network; Iyyer et al. 2015)."""

    def __init__(self, entry: kinds.FC, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.embedding = _embedding(vocab_size, entry.embedding)
        self.head = nn.Sequential(
            nn.Dropout(entry.dropout),
            nn.Linear(entry.embedding, entry.hidden),
            nn.ReLU(),
            nn.Dropout(entry.dropout),
            nn.Linear(entry.hidden, num_labels),
        )

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        weight_BL1 = mask_BL[..., None].to(self.embedding.weight.dtype)
        mean_BE = (self.embedding(ids_BL) * weight_BL1).sum(1) / weight_BL1.sum(1)
        logits_BC: torch.Tensor = self.head(mean_BE)
        return logits_BC


class BiLSTM(nn.Module):
    """One LSTM in each direction; max and mean over the row's tokens, then a linear layer (Tang et al. 2019).

    The backward LSTM reads each row reversed in place (its own last token first). So both see padding only
    after the row's end, and no packing is needed: on a CPU that is 1.3 times as fast as packed sequences.
    """

    def __init__(self, entry: kinds.BiLSTM, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.embedding = _embedding(vocab_size, entry.embedding)
        self.forwards = nn.LSTM(entry.embedding, entry.hidden, batch_first=True)
        self.backwards = nn.LSTM(entry.embedding, entry.hidden, batch_first=True)
        self.dropout = nn.Dropout(entry.dropout)
        self.head = nn.Linear(4 * entry.hidden, num_labels)

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        lengths_B = mask_BL.sum(1)
        place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        mirror_BL = (lengths_B[:, None] - 1 - place_L).clamp(min=0)
        embedded_BLE = self.dropout(self.embedding(ids_BL))
        there_BLH, _ = self.forwards(embedded_BLE)
        reversed_BLE = embedded_BLE.gather(1, mirror_BL[..., None].expand_as(embedded_BLE))
        back_BLH, _ = self.backwards(reversed_BLE)  # its order along L does not matter to max and mean
        states = torch.cat([there_BLH, back_BLH], dim=-1)
        mask_BL1 = mask_BL[..., None]
        most = states.masked_fill(~mask_BL1, float("-inf")).amax(1)
        mean = (states * mask_BL1).sum(1) / lengths_B[:, None]
        logits_BC: torch.Tensor = self.head(self.dropout(torch.cat([most, mean], dim=-1)))
        return logits_BC


class Watched(NamedTuple):
    """What a student answers, and what it thinks meanwhile."""

    logits_BC: torch.Tensor
    states: tuple[torch.Tensor, ...]  # [B, L, W] behind the embeddings and behind each layer
    vectors: dict[int, torch.Tensor]  # layer (the first is 1) -> query, key, value side by side: [B, L, 3 W]


class TinyBERT(nn.Module):
    """A BERT of a few narrow layers from random weights (sizes as in Turc et al. 2019)."""

    def __init__(self, entry: kinds.TinyBERT, vocab_size: int, num_labels: int) -> None:
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
                intermediate_size=INNER * entry.width,
                hidden_dropout_prob=entry.dropout,
                attention_probs_dropout_prob=0.0,  # keeps the fused attention kernel on a CPU
                max_position_embeddings=max(entry.max_length, LEAST_POSITIONS),
                num_labels=num_labels,
            )
        )

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        logits_BC: torch.Tensor = self.bert(input_ids=ids_BL, attention_mask=mask_BL.long()).logits
        return logits_BC

    def watch(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor, layers: Iterable[int] = ()) -> Watched:
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
            out = self.bert(input_ids=ids_BL, attention_mask=mask_BL.long(), output_hidden_states=True)
        finally:
            for hook in hooks:
                hook.remove()
        vectors = {layer: torch.cat(found, -1) for layer, found in parts.items()}
        return Watched(out.logits, out.hidden_states, vectors)


class Llama(nn.Module):
    """A small Llama from random weights (Touvron et al. 2023), its head tied to its embeddings.

    Its tensors are named as those of transformers' LlamaForCausalLM, and `save` writes that model's
    config.json too: what is saved is a checkpoint that transformers loads.
    """

    def __init__(self, entry: kinds.Llama, vocab_size: int, num_labels: int = 0) -> None:
        super().__init__()
        from transformers import LlamaConfig

        self.rebuild(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=entry.width,
                intermediate_size=entry.inner_width,
                num_hidden_layers=entry.layers,
                num_attention_heads=entry.heads,
                num_key_value_heads=entry.num_kv_heads,
                max_position_embeddings=entry.max_length,
                attention_dropout=entry.dropout,
                tie_word_embeddings=True,
                architectures=["LlamaForCausalLM"],
                bos_token_id=None,
                eos_token_id=None,
            )
        )

    def rebuild(self, settings: "LlamaConfig") -> None:
        """Have random weights, of these settings."""
        from transformers import LlamaModel

        self.model = LlamaModel(settings)

    @property
    def head(self) -> torch.Tensor:
        """What turns states into logits: [V, D]."""
        weight: torch.Tensor = self.model.embed_tokens.weight
        return weight

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """States [B, L, D] that the head would read. Padding stands behind: no token looks at it."""
        states_BLD: torch.Tensor = self.model(input_ids=ids_BL, use_cache=False).last_hidden_state
        return states_BLD

    def next_logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """The logits of what follows one row of ids [1, L]: [V]."""
        logits_V: torch.Tensor = self(ids_BL, torch.ones_like(ids_BL).bool())[0, -1] @ self.head.T
        return logits_V


class Transformers(nn.Module):
    """A classifier of transformers, as its config says; saved as transformers saves it."""

    def __init__(self, entry: kinds.Transformers, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.rebuild(by_config.settings(entry, vocab_size, num_labels))

    def rebuild(self, settings: "PreTrainedConfig") -> None:
        """Have random weights, of these settings."""
        self.settings = settings
        self.net = by_config.network(settings)

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        ids_BL = ids_BL.masked_fill(~mask_BL, self.settings.pad_token_id)  # some look for the last true token
        logits_BC: torch.Tensor = self.net(input_ids=ids_BL, attention_mask=mask_BL.long()).logits
        return logits_BC


class MLP(nn.Module):
    """A perceptron over pixels, from 0 to 1."""

    def __init__(self, entry: kinds.MLP, num_pixels: int, num_labels: int) -> None:
        super().__init__()
        self.layers = perceptron(num_pixels, entry.hidden, num_labels, entry.dropout)

    def forward(self, pixels_BP: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]. There is no padding, so the mask says nothing."""
        logits_BC: torch.Tensor = self.layers(pixels_BP / 255)
        return logits_BC


class OneTask(nn.Module):
    """A student of several tasks, as that of one of them.

    The output layer is linear: its rows for one task are a linear head of their own on what all tasks share.
    """

    def __init__(self, student: nn.Module, outputs: Sequence[int]) -> None:
        super().__init__()
        self.student = student
        self.start, self.end = outputs

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, C] of the task."""
        logits_BC: torch.Tensor = self.student(ids_BL, mask_BL)[:, self.start : self.end]
        return logits_BC


KINDS: dict[str, Any] = {
    "fc": FC, "bilstm": BiLSTM, "tinybert": TinyBERT, "llama": Llama, "transformers": Transformers, "mlp": MLP
}  # fmt: skip


def perceptron(num_inputs: int, hidden: Sequence[int], num_outputs: int, dropout: float) -> nn.Sequential:
    """Linear layers with ReLUs and dropout between them."""
    layers: list[nn.Module] = []
    for before, width in zip((num_inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear((num_inputs, *hidden)[-1], num_outputs))


def build(entry: kinds.Student, vocab_size: int, num_labels: int) -> nn.Module:
    """The student that `entry` describes, with random weights from torch's current seed."""
    student: nn.Module = KINDS[entry.kind](entry, vocab_size, num_labels)
    return student


def save(
    directory: Path, model: nn.Module, entry: kinds.Student, vocab_size: int, num_labels: int,
    heads: Mapping[str, tuple[int, int]] | None = None,
) -> None:  # fmt: skip
    """Write model.safetensors and student.json. `heads`: the outputs of each of several tasks."""
    directory.mkdir(parents=True, exist_ok=True)
    held = model.net if isinstance(model, Transformers) else model
    save_file(
        {name: tensor.contiguous() for name, tensor in held.state_dict().items()},
        directory / "model.safetensors",
        metadata={"format": "pt"} if isinstance(model, Transformers) else None,
    )
    if isinstance(model, Transformers):
        model.settings.save_pretrained(directory)
    if isinstance(model, Llama):
        model.model.config.save_pretrained(directory)
    facts: dict[str, Any] = {"student": entry.model_dump(mode="json"), "vocab_size": vocab_size}
    facts |= {"num_labels": num_labels, **({"heads": heads} if heads else {})}
    (directory / "student.json").write_text(json.dumps(facts, indent=2) + "\n")


def load(directory: Path, task: str | None = None) -> nn.Module:
    """The student in `directory`, ready for inference; with `task` its outputs for that one of its tasks.

    Raises AssetError where it is not one, or did not learn the task.
    """
    model = _whole(directory)
    if task is None:
        return model
    heads = json.loads((directory / "student.json").read_text()).get("heads", {})
    if task not in heads:
        raise AssetError(
            f"the student in {directory} learned {sorted(heads)}, not {task}: train it again with "
            f"`dvc repro train-tasks@{directory.parent.name}`."
        )
    return OneTask(model, heads[task]).eval()


def _whole(directory: Path) -> nn.Module:
    if not (directory / "student.json").is_file():
        raise AssetError(
            f"there is no student in {directory}: train it with `dvc repro train@{directory.parent.name}` "
            "(train-after@ where it stands in chained)."
        )
    facts = json.loads((directory / "student.json").read_text())
    entry: kinds.Student = TypeAdapter(kinds.Student).validate_python(facts["student"])
    model = build(entry, facts["vocab_size"], facts["num_labels"])
    if isinstance(model, Transformers):
        from transformers import AutoConfig

        model.rebuild(AutoConfig.from_pretrained(directory, trust_remote_code=False))
        model.net.load_state_dict(load_file(directory / "model.safetensors"))
        return model.eval()
    if isinstance(
        model, Llama
    ):  # a teacher that it started from may have settled what its entry does not say
        from transformers import LlamaConfig

        model.rebuild(LlamaConfig.from_pretrained(directory))
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval()


def _embedding(vocab_size: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(vocab_size, width)
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
    return embedding
