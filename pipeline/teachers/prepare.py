"""The teacher stage: obtain a model, score it, and record it in teacher.json."""

from pathlib import Path
from typing import Any

from pipeline.config.teachers import Teacher
from pipeline.data.rows import load_rows
from pipeline.runtime.files import write_json
from pipeline.teachers.classifier import prepare_classifier
from pipeline.teachers.language_model import prepare_language_model
from pipeline.teachers.record import RECORD


def prepare_teacher(name: str, entry: Teacher, dataset: Path, out: Path) -> dict[str, Any]:
    """Put the teacher `name` into the directory `out`; return its record, which is also out/teacher.json.

    Raises TeacherError or AssetError where the model cannot be the teacher of this dataset.
    """
    rows = load_rows(dataset)
    if rows.task_spec.engine == "language_model":
        record = prepare_language_model(name, entry, rows, out)
    else:
        record = prepare_classifier(name, entry, rows, out)
    write_json(record, out / RECORD)
    return record
