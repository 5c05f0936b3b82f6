"""Bad input, through the real commands: one clear message, a non-zero exit, no traceback unless --debug."""

import csv
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import toy
from tests.stages.conftest import Project


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command ended with one message that holds these words."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def dataset(**changes: Any) -> dict[str, Any]:
    """The toy dataset's entry with changes."""
    return {"toy": toy.params()["datasets"]["toy"] | changes}


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("prepare", {"datasets": dataset(colums={})}, ["datasets.toy.colums", "did you mean 'columns'?"]),
        ("prepare", {"datasets": dataset(columns={"text": "body"})}, ["column 'body' is missing", "'text'"]),
        ("prepare", {"datasets": dataset(labels=["only", "two"], columns={"label": "source"})},
         ["label 'labelled' is outside the set", "['only', 'two']"]),
        ("prepare", {"datasets": dataset(split={"train": 1.0, "validation": 0.0, "test": 0.0})},
         ["the split 'validation' is empty"]),
        ("prepare", {"datasets": dataset(path="nowhere.csv")}, ["nowhere.csv does not exist"]),
        ("teacher", {"teachers": {"tiny": toy.params()["teachers"]["tiny"] | {"max_length": 5}}},
         ["rows are longer than max_length 5 tokens", "too_long: truncate"]),
        ("train", {"runs": {"fc-ce": toy.params()["runs"]["fc-ce"] | {"recipe": "kd-pol"}}},
         ["no 'kd-pol' in recipes", "did you mean 'kd-pool'?"]),
    ],
    ids=["unknown key", "missing column", "label outside the set", "empty split", "missing file", "too long",
         "unknown name"],
)  # fmt: skip
def test_bad_input_is_one_message(
    project: Project, stage: str, changes: dict[str, Any], words: list[str]
) -> None:
    project.params(**changes)
    name = {"prepare": "toy", "teacher": "tiny", "train": "fc-ce"}[stage]
    refused(project.stage(stage, name), *words)


def test_debug_shows_where_an_error_comes_from_and_an_unknown_name_is_named(project: Project) -> None:
    refused(project.stage("train", "fc-cee"), "no 'fc-cee' in runs", "did you mean 'fc-ce'?")
    assert "Traceback" in project.stage("train", "fc-cee", "--debug").stderr


def test_rows_without_text_are_counted_and_dropped_only_where_that_is_asked_for(project: Project) -> None:
    with (project.root / "reviews.csv").open("a", newline="") as file:
        csv.writer(file).writerows([["", 1, "labelled"], ["  ", 0, "labelled"]])
    refused(project.stage("prepare", "toy"), "2 of 122 rows have no text", "empty: drop")
    project.params(datasets=dataset(empty="drop"))
    assert project.stage("prepare", "toy").returncode == 0
    assert '"empty": 2' in (project.root / "data" / "toy" / "summary.json").read_text()


def test_nan_from_the_teacher_names_the_row(project: Project) -> None:
    path = project.root / "teachers" / "tiny" / "model.safetensors"
    weights = load_file(path)
    word = toy.WORDS.index("music") + 5
    weights["bert.embeddings.word_embeddings.weight"][word] = torch.nan
    path.unlink()  # it is a link into DVC's cache
    save_file(weights, path, metadata={"format": "pt"})
    refused(project.stage("cache", "toy"), "the teacher's", "for row", "are not finite")


SMALL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
import runpy
sys.argv = ["stages.cache", "toy"]
runpy.run_module("stages.cache", run_name="__main__")
"""


def test_a_full_disk_keeps_finished_shards_and_the_next_run_goes_on(
    fresh: Callable[..., Project], project: Project
) -> None:
    project.run("rm", "-rf", ".stillroom", "caches/toy")
    code = (project.root / "storage" / "writer.py").read_text()
    limited = code + (
        "\n_put = Store.put\ndef put(self, *arguments):\n    import resource\n"
        "    if len(list(self.root.glob('*/*/shard.json'))) == 2:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "    return _put(self, *arguments)\nStore.put = put\n"
    )  # the kernel refuses to write more than 100 bytes a file from the third shard on
    (project.root / "storage" / "writer.py").write_text(limited)
    command = [sys.executable, "-c", SMALL_DISK, str(2**40)]
    refused(project.run(*command, check=False), "StoreFull: no space left", "Finished shards are kept")
    kept = project.shards()
    assert len(kept) == 2
    (project.root / "storage" / "writer.py").write_text(code)
    assert "64 of 180 rows are captured already" in project.stage("cache", "toy").stderr
    assert kept.items() <= project.shards().items()
