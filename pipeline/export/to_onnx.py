"""The export stage: a trained student -> ONNX in float32 and int8, compared with the student row by row.

The best seed on validation is exported, by the rule that chose the best state of each seed
(training/selection.py). The float32 model must give the student's logits on every test row; the int8 model
may lose a stated share of its accuracy. int8: weights and embeddings are kept in 8 bits, activations are
rounded as they come (onnxruntime's dynamic quantisation).

Shape letters: N rows, B batch, L tokens, C classes.
"""

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript.optimizer import fold_constants

from pipeline.config.params import Export, Run, RunInputs
from pipeline.config.students import MLPStudent, Student
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.evaluation.latency import latencies
from pipeline.export.predictor import FACTS, MODEL_FILES, NOT_EXPORTED, ONNX_NAMES, OnnxModel
from pipeline.objectives.classification import Logits
from pipeline.runtime import hardware
from pipeline.runtime.files import write_json
from pipeline.streaming.model_inputs import InputTensors, call_model, input_tensors, inputs_of
from pipeline.students.registry import load_student
from pipeline.training.job import run_record
from pipeline.training.selection import best_seed
from storage.errors import ExportError

SPLIT = "test"
EXPORTED_KINDS = ("fc", "bilstm", "tinybert")  # they read token ids and give the logits of classes
LARGEST_DIFFERENCE = 1e-3  # of a logit between the student and float32 ONNX; rounding is far below
BATCH_ROWS = 32
FOLDED_BYTES = 2**31  # constants up to this size are computed once, here

Answers = Callable[[InputTensors], Any]
# A batch that a student is traced with, by the names of what it may read.
EXAMPLE = {
    "input_ids": torch.ones((2, 3), dtype=torch.int64),
    "attention_mask": torch.tensor([[True] * 3, [True, True, False]]),
}


def export_run(
    name: str,
    run: Run,
    student: Student,
    limits: Export,
    paths: RunInputs,
    out: Path,
) -> dict[str, Any]:
    """Write the export of a run into `out`; return accuracy, size and latency of each form.

    Raises ExportError where ONNX says something else than the student, or int8 loses too much accuracy.
    A run that cannot be exported gives a record that says why.
    """
    rows = load_rows(paths.dataset).only(SPLIT)
    about: dict[str, Any] = {"name": name, "dataset": run.dataset}
    about |= {"student": run.student, "recipe": run.recipe}
    if (
        isinstance(student, MLPStudent)
        or student.kind not in EXPORTED_KINDS
        or (rows.task_spec.inputs, rows.task_spec.labels) != ("text", "class")
    ):
        why = f"only classifiers of texts are exported, and this is a {student.kind} for {rows.task}."
        shutil.rmtree(out, ignore_errors=True)
        write_json({"run": name, NOT_EXPORTED: why}, out / FACTS)
        return {"about": {**about, NOT_EXPORTED: why}}
    seed = best_seed(run_record(paths))
    shutil.rmtree(out, ignore_errors=True)
    hardware.pin_threads(1)
    shutil.copytree(paths.out / "tokenizer", out)
    reader = TextReader(out, student.max_length, "truncate")
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    trained = paths.out / f"seed-{seed}"
    write_onnx(load_student(trained, paths.task), out)
    files = {
        "torch": trained / "model.safetensors",
        **{form: out / MODEL_FILES[form] for form in MODEL_FILES},
    }
    forms: dict[str, Answers] = {"torch": partial(call_model, load_student(trained, paths.task))}
    forms |= {form: as_answers(OnnxModel(files[form])) for form in MODEL_FILES}
    found = compare_forms(name, rows, tokens, reader.pad_id, forms, limits.int8_max_loss)
    chosen = np.arange(len(rows.row_ids))
    for size in (1, BATCH_ROWS):
        times = latencies(forms, tokens, chosen, reader.pad_id, size)
        for form, milliseconds in times.items():
            found[form][f"latency_ms_batch_{size}"] = milliseconds
    for form, file in files.items():
        found[form]["bytes"] = file.stat().st_size
    facts: dict[str, Any] = {"run": name, "seed": seed, "labels": list(rows.label_names)}
    facts["max_length"] = student.max_length
    write_json(facts, out / FACTS)
    about |= {"seed": seed, "split": SPLIT, "rows": len(chosen), "machine": hardware.machine(), "threads": 1}
    return {**found, "about": about}


def write_onnx(model: torch.nn.Module, out: Path) -> None:
    """Write a student as ONNX, in float32 and int8, into `out`. Both take batches of any rows and tokens.

    One student with an LSTM a process: torch's exporter (2.13) changes how LSTMs are traced, and a second one
    would be refused for its fixed length.
    """
    reads = inputs_of(model)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _quietly():
        program = torch.onnx.export(
            model.eval(), tuple(EXAMPLE[name] for name in reads), dynamo=True, verbose=False,
            input_names=[ONNX_NAMES.get(name, name) for name in reads], output_names=["logits"],
            dynamic_shapes=(any_size,) * len(reads),
        )  # fmt: skip
        assert program is not None
        # torch reorders the gates of an LSTM by slicing its weights; only whole weights can be quantised
        fold_constants(program.model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES)
        made = program.model_proto
        _forget_origin(made)
        onnx.save(made, out / MODEL_FILES["float32"])
        # unsigned: products of signed weights saturate on processors without VNNI, and cost accuracy there
        quantize_dynamic(made, out / MODEL_FILES["int8"], weight_type=QuantType.QUInt8)


def compare_forms(
    name: str, rows: Rows, tokens: Tokens, pad_id: int, forms: dict[str, Answers], int8_max_loss: float
) -> dict[str, dict[str, float]]:
    """Accuracy of each form on all rows, and how near ONNX is to the student ("torch").

    float32 is compared one row at a time and in batches of mixed lengths. int8 answers one row at a time, as
    it does in use: its rounding depends on what else is in a batch. Raises ExportError, see `export`.
    """
    wanted_NC = _logits(forms["torch"], tokens, pad_id, BATCH_ROWS)
    found = {"torch": {"accuracy": _accuracy(wanted_NC, rows)}}
    for size in (1, BATCH_ROWS):
        said_NC = _logits(forms["float32"], tokens, pad_id, size)
        found["float32"] = _beside(wanted_NC, said_NC, rows)
        if not found["float32"]["largest_difference"] <= LARGEST_DIFFERENCE:  # nan is refused too
            worst = int(np.abs(said_NC - wanted_NC).max(1).argmax())
            raise ExportError(
                f"runs.{name}: its ONNX model, {size} rows at a time, does not say what the student says.\n"
                f"  row {rows.row_ids[worst]}: {str(rows.texts[worst])[:60]!r}\n"
                f"  logits found: {said_NC[worst]}, expected: {wanted_NC[worst]}, at most "
                f"{LARGEST_DIFFERENCE} apart\nNothing was exported. The exporter does not know a part of "
                "this student: choose another kind to ship."
            )
    found["int8"] = _beside(wanted_NC, _logits(forms["int8"], tokens, pad_id, 1), rows)
    if (lost := found["int8"]["points_lost"]) > int8_max_loss:
        raise ExportError(
            f"runs.{name}: as int8 it is right on {found['int8']['accuracy']:.1%} of {len(rows.row_ids):,} "
            f"{SPLIT} rows, the student on {found['torch']['accuracy']:.1%}: {lost:.2f} points lost, at most "
            f"{int8_max_loss:g} allowed.\nNothing was exported. Raise export.int8_max_loss in params.yaml if "
            "that is worth it."
        )
    return found


def _logits(answers: Answers, tokens: Tokens, pad_id: int, size: int) -> Logits:
    """Logits [N, C] of all rows in their order, `size` at a time."""
    said = []
    with torch.inference_mode():
        for start in range(0, len(tokens.lengths), size):
            batch = np.arange(start, min(start + size, len(tokens.lengths)))
            said.append(np.asarray(answers(input_tensors(tokens.padded(batch, pad_id)))))
    return np.concatenate(said)


def as_answers(model: OnnxModel) -> Answers:
    """An ONNX model, called as a student is."""
    return lambda inputs: model({name: value.numpy() for name, value in inputs.items()})


def _accuracy(logits_NC: Logits, rows: Rows) -> float:
    return float((logits_NC.argmax(1) == rows.labels).mean())


def _beside(wanted_NC: Logits, said_NC: Logits, rows: Rows) -> dict[str, float]:
    return {
        "accuracy": _accuracy(said_NC, rows),
        "points_lost": 100 * (_accuracy(wanted_NC, rows) - _accuracy(said_NC, rows)),
        "agreement": float((wanted_NC.argmax(1) == said_NC.argmax(1)).mean()),
        "largest_difference": float(np.abs(said_NC - wanted_NC).max()),
    }


def _forget_origin(made: onnx.ModelProto) -> None:
    """Take out where in the source each node comes from (paths of this machine), and the shapes of what lies
    between nodes, which the quantiser changes and then finds to be wrong.
    """
    made.graph.ClearField("value_info")
    for part in (made, made.graph, *made.graph.node, *made.graph.input, *made.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter tells of its own inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
