"""Student architectures, and the files they are kept in.

Each is a module whose forward takes the inputs that its class lists in `reads`, by name, and returns logits
[B, C]; a language model (`Llama`) returns states [B, L, D], and its logits are states times `head`. Padding
never changes an answer. A saved student is a directory with model.safetensors and student.json (its entry of
params.yaml, vocabulary (of `mlp`: numbers of an image) and classes; of several tasks also `heads`, which
outputs belong to which); the tokenizer is in the run's directory, once for all seeds.

Shape letters: B batch, L tokens, C classes, E embedding width, H hidden units, P numbers of an image.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.config.students import Student
from pipeline.runtime.files import write_json
from pipeline.students.architectures import FC, MLP, BiLSTM, TaskHead, TinyBERT, Transformers
from pipeline.students.llama import Llama
from storage.errors import AssetError

STUDENTS: dict[str, Any] = {
    "fc": FC, "bilstm": BiLSTM, "tinybert": TinyBERT, "llama": Llama, "transformers": Transformers, "mlp": MLP
}  # fmt: skip


def build_student(entry: Student, vocab_size: int, num_labels: int) -> nn.Module:
    """The student that `entry` describes, with random weights from torch's current seed."""
    student: nn.Module = STUDENTS[entry.kind](entry, vocab_size, num_labels)
    return student


def save_student(
    directory: Path, model: nn.Module, entry: Student, vocab_size: int, num_labels: int,
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
    write_json(facts, directory / "student.json")


def load_student(directory: Path, task: str | None = None) -> nn.Module:
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
    return TaskHead(model, heads[task]).eval()


def _whole(directory: Path) -> nn.Module:
    if not (directory / "student.json").is_file():
        raise AssetError(
            f"there is no student in {directory}: train it with `dvc repro train@{directory.parent.name}` "
            "(train-after@ where it stands in chained)."
        )
    facts = json.loads((directory / "student.json").read_text())
    entry: Student = TypeAdapter(Student).validate_python(facts["student"])
    model = build_student(entry, facts["vocab_size"], facts["num_labels"])
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
