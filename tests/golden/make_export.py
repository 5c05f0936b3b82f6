"""Writes tests/golden/export: the smallest exported student, for environments without torch. Run by
`make golden`.

An FC student of one number a word, exported as every student is. Its weights are written by hand: good words
count for `positive`, bad ones for `negative`, and all others for neither.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.config.students import FCStudent
from pipeline.export.predictor import FACTS
from pipeline.export.to_onnx import write_onnx
from pipeline.runtime.files import write_json
from pipeline.students.registry import build_student

GOLDEN = Path(__file__).parent / "export"
LABELS = ("negative", "positive")
SCORES = {"[PAD]": 0.0, "[UNK]": 0.0, "film": 0.0, "good": 1.0, "bright": 1.0, "bad": -1.0, "dull": -1.0}


def student() -> torch.nn.Module:
    """The student: its logits are 8 times the mean of the bad words, and 8 times that of the good ones."""
    entry = FCStudent(kind="fc", embedding=1, hidden=2, max_length=16)
    model = build_student(entry, len(SCORES), len(LABELS))
    weights = {
        "embedding.weight": [[score] for score in SCORES.values()],
        "head.1.weight": [[-1.0], [1.0]],
        "head.1.bias": [0.0, 0.0],
        "head.4.weight": [[8.0, 0.0], [0.0, 8.0]],
        "head.4.bias": [0.0, 0.0],
    }
    model.load_state_dict({name: torch.tensor(values) for name, values in weights.items()})
    return model


def write(out: Path) -> None:
    """The export, in the directory `out`."""
    out.mkdir(parents=True)
    words = {word: index for index, word in enumerate(SCORES)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]"])
    tokenizer.save(str(out / "tokenizer.json"))
    write_onnx(student(), out)
    write_json({"run": "golden", "seed": 0, "labels": list(LABELS), "max_length": 16}, out / FACTS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        write(Path(place) / "export")
        shutil.rmtree(GOLDEN, ignore_errors=True)
        shutil.copytree(Path(place) / "export", GOLDEN)
