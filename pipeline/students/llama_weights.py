"""Llama-like students that start from a teacher: the heads that they take, and whether the sizes fit.

Both follow from sizes alone. llama.py reads the weights.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config.students import Decoder
from storage.errors import Mismatch, SpecMismatch

WEIGHTS_FILE = "model.safetensors"
LLAMA_EMBEDDINGS, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"


class HalfLayer(NamedTuple):
    """One of the two halves of a layer, by the names of its parts; each adds to the residual stream."""

    norm: str
    readers: tuple[str, ...]  # linear maps of the normalised stream
    writer: str  # the linear map whose output is added to the stream


HALF_LAYERS = (
    HalfLayer(
        "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
    ),
    HalfLayer("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
)
LAYER_PARTS = tuple(part for block in HALF_LAYERS for part in (block.norm, *block.readers, block.writer))


class Sizes(NamedTuple):
    """Sizes of a Llama-like teacher."""

    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int


class Heads(NamedTuple):
    """The teacher's heads that a student takes, in the student's order."""

    query: list[int]
    kv: list[int]


def llama_tensor(layer: int, part: str) -> str:
    """The name of the weight of a part of a layer in a Llama."""
    return f"model.layers.{layer}.{part}.weight"


def teacher_sizes(weights: Path) -> Sizes:
    """The sizes in config.json of the directory `weights`."""
    model = json.loads((weights / "config.json").read_text())
    width, heads = model["hidden_size"], model["num_attention_heads"]
    return Sizes(
        width=width,
        heads=heads,
        kv_heads=model.get("num_key_value_heads") or heads,
        head_width=model.get("head_dim") or width // heads,
        inner=model["intermediate_size"],
    )


def spread_evenly(num: int, of: int) -> list[int]:
    """`num` of the numbers below `of`, spread evenly, ascending; repeated where `of` is smaller."""
    return [(2 * place + 1) * of // (2 * num) for place in range(num)]


def choose_heads(heads: int, kv_heads: int, teacher: Sizes) -> Heads:
    """Evenly chosen heads, each with the key and value head that it reads in the teacher.

    A key and value head is repeated where the student has more of them. Where a group of the teacher has too
    few heads for the student's, some are taken twice.
    """
    kv, group = spread_evenly(kv_heads, teacher.kv_heads), teacher.heads // teacher.kv_heads
    query = [
        source * group + head
        for source, times in Counter(kv).items()
        for head in spread_evenly(times * heads // kv_heads, group)
    ]
    return Heads(query, kv)


def check_llama_start(what: str, student: Decoder, weights: Path, carried: Sequence[int]) -> None:
    """Raise SpecMismatch where `student` cannot start from the weights in this directory, with every reason.

    `carried` are the layers in it.
    """
    if student.init is None:
        return
    teacher, faults, advice = teacher_sizes(weights), [], []
    if not set(student.init.layers) <= set(carried):
        faults.append(Mismatch("init.layers", list(student.init.layers), f"of {sorted(carried)}"))
        advice.append(
            "Name layers that the cache has, or add layers under caches.NAME.weights, and run "
            "`dvc repro cache@NAME`: the teacher is not run again."
        )
    if student.width > teacher.width:
        faults.append(Mismatch("width", student.width, f"at most {teacher.width}"))
    if student.width != student.heads * teacher.head_width:
        own = f"{student.width} / {student.heads} = {student.width // student.heads}"
        faults.append(Mismatch("width / heads", own, teacher.head_width))
        advice.append(_fitting(student, teacher))
    query = choose_heads(student.heads, student.num_kv_heads, teacher).query
    if student.heads > teacher.heads:
        faults.append(Mismatch("heads", student.heads, f"at most {teacher.heads}"))
    elif len(set(query)) < len(query):
        own = f"{student.num_kv_heads}, for {student.heads // student.num_kv_heads} heads each"
        most = f"at most {teacher.heads // teacher.kv_heads} heads for each of {teacher.kv_heads}"
        faults.append(Mismatch("kv_heads", own, most))
        advice.append("Without kv_heads, each head has its own.")
    if student.inner_width > teacher.inner:
        faults.append(Mismatch("inner", student.inner_width, f"at most {teacher.inner}"))
        advice.append(f"Write inner: {teacher.inner}, or less.")
    if faults:
        raise SpecMismatch(f"{what} cannot start from {weights}", faults, " ".join(advice))


def _fitting(student: Decoder, teacher: Sizes) -> str:
    """Widths and head counts near the student's own that fit heads as wide as the teacher's."""
    fits = [f"heads: {student.heads} goes with width: {student.heads * teacher.head_width}"]
    if student.width % teacher.head_width == 0:
        fits.append(f"width: {student.width} with heads: {student.width // teacher.head_width}")
    return f"The teacher's heads are {teacher.head_width} wide: {', '.join(fits)}."
