"""Whether an encoder of texts can start from a teacher, from sizes alone; names of a BERT's tensors.

initialise.py reads the weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import Mismatch, SpecMismatch

if TYPE_CHECKING:
    from pipeline.config.students import EncoderSection


BERT_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
BERT_POSITIONS = "bert.embeddings.position_embeddings.weight"
BERT_LAYER_PREFIX = "bert.encoder.layer."
_BOTH = ("weight", "bias")
_AROUND = (  # of a classifier, besides its layers
    BERT_EMBEDDINGS,
    BERT_POSITIONS,
    "bert.embeddings.token_type_embeddings.weight",
    *(f"{part}.{kind}" for part in ("bert.embeddings.LayerNorm", "bert.pooler.dense", "classifier")
      for kind in _BOTH),
)  # fmt: skip
_PARTS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
# Settings of every student of kind tinybert.
BERT_SETTINGS: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
FEED_FORWARD_RATIO = 4  # times the width: inside its feed-forward blocks
MIN_POSITIONS = 16


def bert_tensors(layers: Sequence[int]) -> list[str]:
    """Names of the tensors of a BERT classifier that a student of these layers needs."""
    return [
        *_AROUND,
        *(f"{BERT_LAYER_PREFIX}{n}.{part}.{kind}" for n in layers for part in _PARTS for kind in _BOTH),
    ]


def check_bert_start(what: str, student: "EncoderSection", weights: Path, carried: Sequence[int]) -> None:
    """Raise SpecMismatch where `student` cannot start from the weights in this directory, with every reason.

    `carried` are the layers that it has.
    """
    if student.init is None or not student.init.from_teacher:
        return
    teacher = json.loads((weights / "config.json").read_text())
    faults, advice = [], ""
    if teacher.get("model_type") != "bert":
        faults.append(Mismatch("the teacher's model_type", teacher.get("model_type"), "bert"))
        advice = "Remove init."
    elif student.layer_sizes is not None and (layers := getattr(student.init, "layers", None)) is not None:
        faults, advice = _mismatched_layers(student, layers, teacher, carried)
    else:
        field = student.embedding_field
        if getattr(student, field) > teacher["hidden_size"]:
            faults.append(Mismatch(field, getattr(student, field), f"at most {teacher['hidden_size']}"))
            advice = "No factorisation of the teacher's embeddings is wider than they are."
    if faults:
        raise SpecMismatch(f"{what} cannot start from {weights}", faults, advice)


def _mismatched_layers(
    student: "EncoderSection", layers: tuple[int, ...], teacher: dict[str, Any], carried: Sequence[int]
) -> tuple[list[Mismatch], str]:
    """(what differs from a teacher whose layers are to be copied, what to do)."""
    assert student.layer_sizes is not None
    _, width, heads = student.layer_sizes
    own = {
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": FEED_FORWARD_RATIO * width,
        **BERT_SETTINGS,
    }
    theirs = {key: teacher.get(key, BERT_SETTINGS.get(key)) for key in own}
    faults = [Mismatch(key, value, theirs[key]) for key, value in own.items() if theirs[key] != value]
    positions, most = max(student.max_length, MIN_POSITIONS), teacher["max_position_embeddings"]
    if positions > most:
        faults.append(Mismatch("max_length", positions, f"at most {most}"))
    advice = ["Layers are copied: take the teacher's sizes, or init: {embeddings: svd}."] if faults else []
    if not set(layers) <= set(carried):
        faults.append(Mismatch("init.layers", list(layers), f"of {sorted(carried)}"))
        advice.append(
            "Name layers that the cache has, or add layers under caches.NAME.weights, and run "
            "`dvc repro cache@NAME`: the teacher is not run again."
        )
    return faults, " ".join(advice)
