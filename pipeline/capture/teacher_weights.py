"""The teacher's weights that a cache carries, so that students can start from them without the teacher.

Tensors are found by name in the teacher's own files and copied as they are: the model is never loaded.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from pipeline.config.caches import Weights
from pipeline.engines.model_files import weight_files
from pipeline.students.bert_weights import BERT_LAYER_PREFIX, bert_tensors
from pipeline.students.llama_weights import (
    FINAL_NORM,
    LAYER_PARTS,
    LLAMA_EMBEDDINGS,
    WEIGHTS_FILE,
    llama_tensor,
)
from storage import Cache
from storage.errors import Mismatch, SpecMismatch, TeacherError

HEAD = "lm_head.weight"
BUFFER = "rotary_emb.inv_freq"  # in old files; it follows from config.json


def find_tensors(name: str, teacher: Path, layers: Sequence[int]) -> dict[str, Path]:
    """The file of each tensor that the cache `name` carries.

    Raises TeacherError where the teacher lacks a layer, or is of an unsupported architecture.
    """
    model = json.loads((teacher / "config.json").read_text())
    if model.get("model_type") not in ("llama", "bert"):
        raise _unsupported(name, teacher, f"its model_type is {model.get('model_type')!r}")
    if past := [layer for layer in layers if layer >= model["num_hidden_layers"]]:
        raise TeacherError(
            f"caches.{name}.weights.layers: the teacher in {teacher} has layers 0 to "
            f"{model['num_hidden_layers'] - 1}, not {past}."
        )
    where: dict[str, Path] = {}
    for path in weight_files(teacher):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    prefix = BERT_LAYER_PREFIX if model["model_type"] == "bert" else "model.layers."
    if model["model_type"] == "bert":
        wanted = bert_tensors(layers)
    else:
        wanted = [
            LLAMA_EMBEDDINGS,
            FINAL_NORM,
            *(llama_tensor(layer, part) for layer in layers for part in LAYER_PARTS),
        ]
        if not model.get("tie_word_embeddings", False):
            wanted.append(HEAD)
    if missing := [tensor for tensor in wanted if tensor not in where]:
        raise _unsupported(name, teacher, f"it has no {', '.join(missing[:3])}")
    own = tuple(f"{prefix}{layer}." for layer in layers)
    if more := [t for t in where if t.startswith(own) and t not in wanted and not t.endswith(BUFFER)]:
        raise _unsupported(name, teacher, f"it has {', '.join(sorted(more)[:3])} too")
    return {tensor: where[tensor] for tensor in wanted}


def write_tensors(found: dict[str, Path], teacher: Path, out: Path) -> None:
    """Write these tensors to out/model.safetensors, and copy the teacher's config.json next to it."""
    tensors = {}
    for tensor, path in found.items():
        with safe_open(path, "pt") as file:
            tensors[tensor] = file.get_tensor(tensor)
    # Not save_file: its files are readable by their owner alone, and its errors do not name a full disk.
    (out / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    shutil.copyfile(teacher / "config.json", out / "config.json")


def check_weights(name: str, cache: Cache, entry: Weights | None, teacher: Path) -> None:
    """Raise SpecMismatch where the cache does not carry this teacher's tensors of the layers of `entry`."""
    layers = entry.layers if entry else ()
    faults = []
    if layers != cache.weights_layers:
        faults.append(Mismatch("weights.layers", list(cache.weights_layers), list(layers)))
    elif layers:
        with safe_open(cache.weights_dir / WEIGHTS_FILE, "pt") as held:
            known = set(held.keys())
            for tensor, path in find_tensors(name, teacher, layers).items():
                with safe_open(path, "pt") as file:
                    own = file.get_tensor(tensor)
                if tensor not in known or not torch.equal(held.get_tensor(tensor), own):
                    faults.append(Mismatch(tensor, "another tensor", "the teacher's"))
    if faults:
        advice = f"Rebuild it with `dvc repro cache@{name}`: the teacher is not run again."
        raise SpecMismatch(f"{cache.path} does not fit caches.{name}", faults[:10], advice)


def _unsupported(name: str, teacher: Path, reason: str) -> TeacherError:
    parts = ", ".join(f"{part}.weight" for part in LAYER_PARTS)
    return TeacherError(
        f"caches.{name}.weights: students cannot start from the teacher in {teacher}: {reason}.\n"
        f"Supported is model_type llama with the tensors {LLAMA_EMBEDDINGS}, {FINAL_NORM}, {HEAD} "
        f"(unless tied) and, in model.layers.N, {parts}: no biases, not quantised; and model_type bert as "
        "BertForSequenceClassification saves it.\nLeave `weights` out: the cache then has targets alone."
    )
