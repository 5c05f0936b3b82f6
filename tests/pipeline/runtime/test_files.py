"""JSON files are written in one way."""

import math
import re
from pathlib import Path

import pytest

from pipeline.runtime.files import write_json
from tests.imports import modules

# Indented JSON, and files that are flushed, outside of the one function.
BY_HAND = re.compile(r"\bindent=|os\.fsync\(")
OWN_FILES = {"pipeline.runtime.files", "storage.disk"}


def test_json_is_indented_ends_in_a_newline_and_makes_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "results" / "a.json"
    write_json({"b": [1], "a": "ü"}, path)
    assert path.read_bytes() == b'{\n  "b": [\n    1\n  ],\n  "a": "\\u00fc"\n}\n'
    write_json({"a": "ü"}, path, ensure_ascii=False)
    assert path.read_text() == '{\n  "a": "ü"\n}\n'


def test_what_json_has_no_word_for_is_refused_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json({"loss": 1.0}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"loss": math.nan}, path)
    assert path.read_text() == '{\n  "loss": 1.0\n}\n'


def test_no_other_file_indents_json_or_flushes_by_hand() -> None:
    found = {name: BY_HAND.search(path.read_text()) for name, path in modules().items()}
    assert not {name: hit for name, hit in found.items() if hit and name not in OWN_FILES}
