"""The golden capture: the numbers that a fixed teacher is captured as may not change under one
CAPTURE_VERSION.
"""

import json
from pathlib import Path

import pytest

from tests.golden import make_capture


def test_what_a_fixed_teacher_is_captured_as_has_not_changed_under_this_capture_version(
    tmp_path: Path,
) -> None:
    make_capture.write_teacher(tmp_path / "teacher")
    golden = json.loads(make_capture.GOLDEN.read_text())
    found = json.loads(json.dumps(make_capture.captured(tmp_path / "teacher")))
    advice = "capture gives other numbers: raise pipeline/CAPTURE_VERSION, then run `make golden`"
    for field in ("teacher", "tokenizer", "input_hashes"):
        assert found[field] == golden[field], advice
    assert found["capture_version"] == golden["capture_version"], "run `make golden`"
    for row, expected in zip(found["logits"], golden["logits"], strict=True):
        assert row == pytest.approx(expected, abs=2e-4), advice
    for layer, rows in golden["hidden"].items():
        for row, expected in zip(found["hidden"][layer], rows, strict=True):
            assert row == pytest.approx(expected, abs=2e-4), advice
