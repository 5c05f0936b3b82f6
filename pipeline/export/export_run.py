"""The export stage: the best seed of a run -> ONNX in float32 and int8, compared with the student.

The best seed on validation is exported, by the rule that chose the best state of each seed
(training/selection.py).
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.params import Export, Run, RunInputs
from pipeline.config.students import Student
from pipeline.data.inputs import read_inputs, student_reader
from pipeline.data.rows import TEST, Rows, load_rows
from pipeline.evaluation.latency import latencies
from pipeline.export.compare import ComparedRows, ModelCall, compare_forms, onnx_call
from pipeline.export.predictor import FACTS, MODEL_FILES, NOT_EXPORTED, OnnxModel
from pipeline.export.to_onnx import write_onnx
from pipeline.runtime import hardware
from pipeline.runtime.files import write_json
from pipeline.streaming.model_inputs import call_model
from pipeline.students.registry import load_student
from pipeline.training.job import run_record
from pipeline.training.selection import best_seed


def export_run(
    name: str, run: Run, student: Student, limits: Export, paths: RunInputs, out: Path
) -> dict[str, Any]:
    """Write the export of a run into `out`; return accuracy, size and latency of each form.

    Raises ExportError as `compare_forms` does. A run that cannot be exported gets a record with the reason.
    """
    rows = load_rows(paths.dataset).only(TEST)
    about: dict[str, Any] = {"name": name, "dataset": run.dataset}
    about |= {"student": run.student, "recipe": run.recipe}
    if not _is_exported(student, rows):
        reason = f"only classifiers of texts are exported, and this is a {student.kind} for {rows.task}."
        shutil.rmtree(out, ignore_errors=True)
        write_json({"run": name, NOT_EXPORTED: reason}, out / FACTS)
        return {"about": {**about, NOT_EXPORTED: reason}}
    seed = best_seed(run_record(paths))
    shutil.rmtree(out, ignore_errors=True)
    hardware.pin_threads(1)
    shutil.copytree(paths.out / "tokenizer", out)
    reader = student_reader(student, rows, out)
    compared = ComparedRows(rows, read_inputs(reader, rows), reader.pad_id)
    found = _export_student(name, paths.out / f"seed-{seed}", paths.task, compared, limits, out)
    facts: dict[str, Any] = {"run": name, "seed": seed, "labels": list(rows.label_names)}
    facts["max_length"] = reader.max_length
    write_json(facts, out / FACTS)
    about |= {"seed": seed, "split": TEST, "rows": len(rows.row_ids)}
    return {**found, "about": {**about, "machine": hardware.machine(), "threads": 1}}


def _export_student(
    name: str, trained: Path, task: str | None, compared: ComparedRows, limits: Export, out: Path
) -> dict[str, dict[str, float]]:
    """Write the ONNX models of one seed's student into `out`; accuracy, latency and size of each form."""
    write_onnx(load_student(trained, task), out)
    files = {form: out / file for form, file in MODEL_FILES.items()}
    forms: dict[str, ModelCall] = {"torch": partial(call_model, load_student(trained, task))}
    forms |= {form: onnx_call(OnnxModel(file)) for form, file in files.items()}
    found = compare_forms(name, compared, forms, limits.int8_max_loss)
    chosen = np.arange(len(compared.rows.row_ids))
    milliseconds = latencies(forms, compared.tokens, chosen, compared.pad_id)
    for form, file in {"torch": trained / "model.safetensors", **files}.items():
        found[form] |= {**milliseconds[form], "bytes": file.stat().st_size}
    return found


def _is_exported(student: Student, rows: Rows) -> bool:
    """Whether the student is a classifier of texts of a kind that is exported."""
    return student.exportable and (rows.task_spec.inputs, rows.task_spec.labels) == ("text", "class")
