"""Exported students against torch: int8 ONNX, float32 ONNX and torch in turns, batch 1 and 32, one thread.

Students have random weights (latency does not depend on them) and rows have the lengths of the reviews: a
BERT of 4 layers x 312 (TinyBERT's shape), a BiLSTM and an FC over MiniLM's vocabulary. The accuracy that int8
costs is measured on trained students, by the export stage. Last line: JSON with the ratios (above 1: faster
than torch).
"""

import tempfile
from pathlib import Path

import common
import numpy as np
import torch

from pipeline.config.students import BiLSTMStudent, FCStudent, Student, TinyBERTStudent
from pipeline.data.tokenizer import Tokens
from pipeline.evaluation.latency import latencies
from pipeline.export.compare import onnx_call
from pipeline.export.predictor import MODEL_FILES, OnnxModel
from pipeline.export.to_onnx import write_onnx
from pipeline.runtime import hardware
from pipeline.students.registry import build_student

ROWS, VOCAB, CLASSES = 512, 30_522, 2
STUDENTS: dict[str, Student] = {
    "tinybert-4x312": TinyBERTStudent(kind="tinybert", layers=4, width=312, heads=12),
    "bilstm": BiLSTMStudent(kind="bilstm", embedding=96, hidden=96),
    "fc": FCStudent(kind="fc", embedding=96, hidden=128),
}


def main() -> None:
    hardware.pin_threads(1)
    generator = np.random.default_rng(0)
    lengths = generator.integers(6, 42, ROWS)
    ids = generator.integers(1000, VOCAB, lengths.sum()).astype(np.int32)
    tokens = Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]), 0)
    result: dict[str, dict[str, float]] = {}
    for name, entry in STUDENTS.items():
        torch.manual_seed(0)
        model = build_student(entry, VOCAB, CLASSES).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        with tempfile.TemporaryDirectory() as directory:
            write_onnx(model, Path(directory))
            files = {form: Path(directory) / file for form, file in MODEL_FILES.items()}
            sizes = {form: file.stat().st_size / 1e6 for form, file in files.items()}
            forms = {"torch": model, **{form: onnx_call(OnnxModel(file)) for form, file in files.items()}}
            for size in (1, 32):
                times = latencies(forms, tokens, np.arange(ROWS), 0, size)
                print(
                    f"{name}, batch {size}: " + ", ".join(f"{form} {ms:.3f} ms" for form, ms in times.items())
                )
                for form in MODEL_FILES:
                    ratio = result.setdefault(f"{form}_over_torch_batch_{size}", {})
                    ratio[name] = times["torch"] / times[form]
        print(
            f"{name}: {4e-6 * parameters:.1f} MB in torch, "
            + ", ".join(f"{f} {m:.1f}" for f, m in sizes.items())
        )
    common.print_result(result)


if __name__ == "__main__":
    main()
