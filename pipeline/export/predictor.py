"""Predictions of an exported student: needs onnxruntime and the tokenizers library, never torch.

exported/RUN is complete: model.onnx (float32), model.int8.onnx, the tokenizer's files, and export.json with
the labels in order, the maximum number of tokens, the run and the seed. export.json is written last, after
the models were compared with the student; a run that cannot be exported has it alone, with the reason.

Shape letters: B batch, L tokens, C classes.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from onnxruntime import InferenceSession, SessionOptions

from pipeline.config.base import did_you_mean
from pipeline.data.tokenizer import InputArrays, TextReader
from storage.errors import AssetError, ConfigError, DataError, ExportError

FACTS = "export.json"
NOT_EXPORTED = "not_exported"
# Names of the inputs in an exported model. Existing exports have these names.
ONNX_NAMES = {"input_ids": "ids", "attention_mask": "mask"}
MODEL_FILES = {"float32": "model.onnx", "int8": "model.int8.onnx"}

Precision = Literal["float32", "int8"]


class Prediction(NamedTuple):
    """The prediction of a student for one text."""

    text: str
    label: str
    probabilities: dict[str, float]  # of every label, in their order


class OnnxModel:
    """An ONNX model of a student, on one thread."""

    def __init__(self, path: Path) -> None:
        options = SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._reads = {part.name for part in self._session.get_inputs()}

    def __call__(self, inputs: InputArrays) -> npt.NDArray[np.float32]:
        """Logits [B, C]; inputs that the model does not read are left out."""
        named = {ONNX_NAMES.get(name, name): array for name, array in inputs.items()}
        fed = {name: array for name, array in named.items() if name in self._reads}
        logits_BC: npt.NDArray[np.float32] = self._session.run(None, fed)[0]
        return logits_BC


class Predictor:
    """An exported student. Raises AssetError where its directory is incomplete, ExportError where its run has
    no export.
    """

    def __init__(self, directory: Path, precision: Precision) -> None:
        facts: dict[str, Any] = json.loads((directory / FACTS).read_text())
        if NOT_EXPORTED in facts:
            raise ExportError(f"runs.{facts['run']} has no export: {facts[NOT_EXPORTED]}")
        path = directory / MODEL_FILES[precision]
        if not path.is_file():
            raise AssetError(
                f"{path} is missing: fetch it with `dvc pull {directory}`, or make it with "
                f"`dvc repro export@{facts['run']}`."
            )
        self.labels: list[str] = facts["labels"]
        self._model = OnnxModel(path)
        self._reader = TextReader(directory, facts["max_length"], "truncate")

    def predict(self, text: str) -> Prediction:
        """The prediction for one text. Texts are run one at a time: int8 rounding depends on the whole batch.

        Raises DataError for a text of white space only.
        """
        if not text.strip():
            raise DataError("one of the texts is empty: remove it.")
        tokens = self._reader.read([text], ["the text"])
        logits_C = self._model(tokens.padded(np.array([0]), self._reader.pad_id))[0].astype(np.float64)
        odds_C = np.exp(logits_C - logits_C.max())
        shares = (odds_C / odds_C.sum()).tolist()
        return Prediction(
            text, self.labels[int(logits_C.argmax())], dict(zip(self.labels, shares, strict=True))
        )


def find_export(name: str, exported: Path, runs: Callable[[], Iterable[str]]) -> Path:
    """The directory of the run's export, or `name` itself where that is one.

    `runs` gives the runs of params.yaml. Raises AssetError for one of them, ConfigError for an unknown name.
    """
    for directory in (Path(name), exported / name):
        if (directory / FACTS).is_file():
            return directory
    known = list(runs())
    if name in known:
        raise AssetError(
            f"runs.{name} is not exported yet: make it with `dvc repro export@{name}`, or fetch it with "
            f"`dvc pull {exported / name}`."
        )
    there = sorted({*known, *(path.parent.name for path in exported.glob(f"*/{FACTS}"))})
    raise ConfigError(f"no run and no exported directory is called {name!r}{did_you_mean(name, there)}")
