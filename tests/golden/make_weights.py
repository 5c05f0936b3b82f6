"""Writes tests/golden/weights-v3: a small cache that carries weights of its teacher. Run by `make golden`."""

import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file

from pipeline.capture.teacher_weights import find_tensors, write_tensors
from pipeline.students.llama_weights import FINAL_NORM, LAYER_PARTS, LLAMA_EMBEDDINGS, llama_tensor
from storage.seal import CarriedWeights, SealedParts, seal
from storage.writer import Store
from tests.storage.conftest import IDENTITY, fill

GOLDEN = Path(__file__).parent / "weights-v3"
LAYERS = (2, 0)
SHAPES = {
    "self_attn.q_proj": (4, 4), "self_attn.k_proj": (2, 4), "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4), "mlp.gate_proj": (6, 4), "mlp.up_proj": (6, 4), "mlp.down_proj": (4, 6),
}  # fmt: skip


def write_teacher(directory: Path) -> None:
    """A Llama of three layers that is four wide, tied; its numbers are small whole ones."""
    names = {LLAMA_EMBEDDINGS: (5, 4), FINAL_NORM: (4,)}
    names |= {llama_tensor(layer, part): SHAPES.get(part, (4,)) for layer in range(3) for part in LAYER_PARTS}
    tensors = {
        name: (torch.arange(torch.Size(shape).numel()) % 7 + place % 5).reshape(shape).to(torch.bfloat16)
        for place, (name, shape) in enumerate(names.items())
    }
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"intermediate_size": 6, "num_hidden_layers": 3, "vocab_size": 5, "tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write(out: Path) -> None:
    """The golden cache, in `out`."""
    with tempfile.TemporaryDirectory() as made:
        teacher = Path(made) / "teacher"
        write_teacher(teacher)
        found = find_tensors("golden", teacher, LAYERS)
        carried = CarriedWeights(LAYERS, partial(write_tensors, found, teacher))
        shards = fill(Store(Path(made) / "store"), (3, 2))
        files = {"tokenizer.json": b"{}\n"}
        seal(out, SealedParts(IDENTITY, shards, files, {"teacher": "golden"}, weights=carried))


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
