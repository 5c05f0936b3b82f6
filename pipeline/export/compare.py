"""An exported model compared with its student, row by row: what the export stage requires of it.

The float32 model must give the student's logits on every row. The int8 model may lose a stated share of its
accuracy.

Shape letters: N rows, C classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.data.inputs import Inputs
from pipeline.data.rows import TEST, Rows
from pipeline.export.predictor import OnnxModel
from pipeline.objectives.classification import Logits
from pipeline.streaming.model_inputs import InputTensors, input_tensors
from storage.errors import ExportError

BATCH_ROWS = 32
LARGEST_DIFFERENCE = 1e-3  # of a logit between the student and float32 ONNX; rounding is far below

ModelCall = Callable[[InputTensors], Any]  # gives logits [B, C]


class ComparedRows(NamedTuple):
    """The rows that all forms of a student are run on."""

    rows: Rows
    tokens: Inputs
    pad_id: int

    def logits(self, model: ModelCall, size: int) -> Logits:
        """Logits [N, C] of all rows in their order, computed `size` rows at a time."""
        found, num = [], len(self.tokens.lengths)
        with torch.inference_mode():
            for start in range(0, num, size):
                batch = np.arange(start, min(start + size, num))
                found.append(np.asarray(model(input_tensors(self.tokens.padded(batch, self.pad_id)))))
        return np.concatenate(found)


def onnx_call(model: OnnxModel) -> ModelCall:
    """An ONNX model, called as a student is."""
    return lambda inputs: model({name: value.numpy() for name, value in inputs.items()})


def compare_forms(
    name: str, compared: ComparedRows, forms: Mapping[str, ModelCall], int8_max_loss: float
) -> dict[str, dict[str, float]]:
    """Accuracy of each form on all rows, and how close ONNX is to the student ("torch").

    float32 is compared one row at a time and in batches of mixed lengths. int8 runs one row at a time, as it
    does in use: its rounding depends on the other rows of a batch. Raises ExportError where float32 gives
    other logits than the student, or int8 loses more than `int8_max_loss` points of accuracy.
    """
    student_NC = compared.logits(forms["torch"], BATCH_ROWS)
    found = {"torch": {"accuracy": _accuracy(student_NC, compared.rows)}}
    for size in (1, BATCH_ROWS):
        onnx_NC = compared.logits(forms["float32"], size)
        found["float32"] = _differences(student_NC, onnx_NC, compared.rows)
        if not found["float32"]["largest_difference"] <= LARGEST_DIFFERENCE:  # NaN is refused too
            raise _other_logits(name, compared.rows, size, student_NC, onnx_NC)
    found["int8"] = _differences(student_NC, compared.logits(forms["int8"], 1), compared.rows)
    if (lost := found["int8"]["points_lost"]) > int8_max_loss:
        raise ExportError(
            f"runs.{name}: as int8 it is right on {found['int8']['accuracy']:.1%} of "
            f"{len(compared.rows.row_ids):,} {TEST} rows, the student on {found['torch']['accuracy']:.1%}: "
            f"{lost:.2f} points lost, at most {int8_max_loss:g} allowed.\n"
            "Nothing was exported. Raise export.int8_max_loss in params.yaml if that is acceptable."
        )
    return found


def _accuracy(logits_NC: Logits, rows: Rows) -> float:
    return float((logits_NC.argmax(1) == rows.labels).mean())


def _differences(student_NC: Logits, onnx_NC: Logits, rows: Rows) -> dict[str, float]:
    return {
        "accuracy": _accuracy(onnx_NC, rows),
        "points_lost": 100 * (_accuracy(student_NC, rows) - _accuracy(onnx_NC, rows)),
        "agreement": float((student_NC.argmax(1) == onnx_NC.argmax(1)).mean()),
        "largest_difference": float(np.abs(onnx_NC - student_NC).max()),
    }


def _other_logits(name: str, rows: Rows, size: int, student_NC: Logits, onnx_NC: Logits) -> ExportError:
    worst = int(np.abs(onnx_NC - student_NC).max(1).argmax())
    return ExportError(
        f"runs.{name}: its ONNX model, {size} rows at a time, gives other logits than the student.\n"
        f"  row {rows.row_ids[worst]}: {str(rows.texts[worst])[:60]!r}\n"
        f"  logits found: {onnx_NC[worst]}, expected: {student_NC[worst]}, at most "
        f"{LARGEST_DIFFERENCE} apart\nNothing was exported. The exporter does not support a part of this "
        "student: choose another kind to ship."
    )
