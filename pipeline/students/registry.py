"""Builds, saves and loads students: the one table of kinds and their modules.

A saved student is a directory with model.safetensors, student.json (its entry of params.yaml, vocabulary (of
`mlp`: numbers of an image) and classes; of several tasks also `heads`, the outputs of each) and the files of
`StudentModel.save_settings`. The tokenizer is in the run's directory, once for all seeds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from pipeline.config.students import Student
from pipeline.runtime.files import write_json
from pipeline.students.base import StudentModel, TaskHead
from pipeline.students.bilstm import BiLSTM
from pipeline.students.fc import FC
from pipeline.students.llama import Llama
from pipeline.students.mlp import MLP
from pipeline.students.tinybert import TinyBERT
from pipeline.students.transformers_classifier import Transformers
from storage.errors import AssetError

# The constructor of each kind takes (entry, vocabulary size, number of outputs).
STUDENT_MODELS: dict[str, Any] = {
    "fc": FC, "bilstm": BiLSTM, "tinybert": TinyBERT, "llama": Llama, "transformers": Transformers, "mlp": MLP
}  # fmt: skip


def build_student(entry: Student, vocab_size: int, num_labels: int) -> StudentModel:
    """The student that `entry` describes, with random weights from torch's current seed."""
    student: StudentModel = STUDENT_MODELS[entry.kind](entry, vocab_size, num_labels)
    return student


def save_student(
    directory: Path, model: StudentModel, entry: Student, vocab_size: int, num_labels: int,
    heads: Mapping[str, tuple[int, int]] | None = None,
) -> None:  # fmt: skip
    """Write model.safetensors, student.json and the files that the kind needs besides.

    `heads`: the outputs of each of several tasks.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.stored.state_dict().items()},
        directory / "model.safetensors",
        metadata=model.file_metadata,
    )
    model.save_settings(directory)
    facts: dict[str, Any] = {"student": entry.model_dump(mode="json"), "vocab_size": vocab_size}
    facts |= {"num_labels": num_labels, **({"heads": heads} if heads else {})}
    write_json(facts, directory / "student.json")


def load_student(directory: Path, task: str | None = None) -> StudentModel | TaskHead:
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


def _whole(directory: Path) -> StudentModel:
    if not (directory / "student.json").is_file():
        raise AssetError(
            f"there is no student in {directory}: train it with `dvc repro train@{directory.parent.name}` "
            "(train-after@ for a run in chained)."
        )
    facts = json.loads((directory / "student.json").read_text())
    entry: Student = TypeAdapter(Student).validate_python(facts["student"])
    model = build_student(entry, facts["vocab_size"], facts["num_labels"])
    model.load_settings(directory)
    model.stored.load_state_dict(load_file(directory / "model.safetensors"))
    return model.eval()
