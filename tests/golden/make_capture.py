"""Writes tests/golden/capture.json: what a teacher of fixed weights is captured as today.

Run by `make golden`. A diff in the file means that capture gives other numbers than before: raise
pipeline/CAPTURE_VERSION with it, so that nobody mixes shards of the two.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipeline.capture.identity import CAPTURE_VERSION, capture_identity
from pipeline.config.caches import CacheEntry, Hidden
from pipeline.engines.hidden_states import HiddenStateRecorder
from pipeline.engines.inference import InferenceRequest, infer_rows
from pipeline.engines.loading import load_classifier
from pipeline.teachers.record import RECORD, teacher_reader
from tests import toy

GOLDEN = Path(__file__).parent / "capture.json"
DIGITS = 4


def write_teacher(directory: Path) -> None:
    """The toy model with weights that depend on their names alone, not on torch's generators."""
    toy.write_model(directory)
    path = directory / "model.safetensors"
    weights = load_file(path)
    for place, name in enumerate(sorted(weights)):
        shape = weights[name].shape
        bits = np.random.PCG64(place).random_raw(weights[name].numel())
        values = (bits >> 11).astype(np.float64) / 2**53 - 0.5
        weights[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    save_file(weights, path, metadata={"format": "pt"})
    record = {"task": "sequence-classification", "labels": ["negative", "positive"]}
    record |= {"max_length": 32, "too_long": "error"}
    (directory / RECORD).write_text(json.dumps(record))


def captured(directory: Path) -> dict[str, Any]:
    """Logits and pooled states of a few texts, rounded, and the fingerprints that name them."""
    entry = CacheEntry(dataset="toy", teacher="golden", hidden=Hidden(layers=(1, 2)), precision="float32")
    who = capture_identity(entry, directory)
    reader = teacher_reader(directory)
    texts = toy.texts(6)
    tokens = reader.read(texts, texts)
    model, rows = load_classifier(directory), np.arange(len(texts))
    recorder = HiddenStateRecorder(model, who.spec.hidden, tokens.lengths, rows, texts)
    logits = infer_rows(model, InferenceRequest(tokens, rows, reader.pad_id), recorder.record)
    return {
        "capture_version": CAPTURE_VERSION,
        "teacher": who.teacher.model_dump(),
        "tokenizer": who.tokenizer.model_dump(),
        "input_hashes": tokens.hashes().to_pylist(),
        "logits": logits.astype(float).round(DIGITS).tolist(),
        "hidden": {
            name.removeprefix("layer."): states[:, :4].astype(float).round(DIGITS).tolist()
            for name, states in recorder.found.items()
        },
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        write_teacher(Path(made) / "teacher")
        GOLDEN.write_text(json.dumps(captured(Path(made) / "teacher"), indent=1) + "\n")
