"""docs/extending.md: its blocks, applied to a copy, work in every stage; its table counts them.

All additions are made in one copy, and one process runs all stages: importing torch costs more than the toy.
"""

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from tests import toy
from tests.imports import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
DIRECTIVE = re.compile(
    r"# (?:new file (?P<new>\S+)|(?P<path>\S+), (?P<how>before|in|after|instead of) (?P<where>.+))"
)
# The runs of each section, and the caches that they read.
RUNS = {
    "A task": ("tagging", "tagged-images"),
    "A student": ("attention-kd", "toy"),
    "A divergence": ("fc-tv", "toy"),
    "A feature loss": ("bert-cka", "toy"),
    "A codec": ("fc-nucleus", "nucleus"),
    "A teacher engine": ("fc-ranked", "ranked"),
}
DRIVER = """
import importlib
import json
import sys

from storage.errors import StillroomError


def run(stage, names):
    for name in names:
        importlib.import_module(f"stages.{stage}").main(*([name] if name else []))


if __name__ == "__main__":
    for stage, names in json.loads(sys.argv[1]):
        run(stage, names)
    try:
        run("cache", ["ranked-dense"])
    except StillroomError as error:
        print(f"refused: {error}")
"""


class Block(NamedTuple):
    """A block of code of the page, and where its lines go."""

    path: str
    how: str  # "new file", "before", "in", "after" or "instead of"
    where: str
    lines: str


def sections() -> dict[str, str]:
    """The text below each heading of the second level."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def blocks(section: str) -> list[Block]:
    """The Python blocks of a section, in order."""
    found = []
    for code in re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL):
        first, lines = code.split("\n", 1)
        match = DIRECTIVE.fullmatch(first)
        assert match, f"no directive: {first}"
        if match["new"]:
            found.append(Block(match["new"], "new file", "", lines))
        else:
            found.append(Block(match["path"], match["how"], match["where"], lines))
    return found


def entries(section: str) -> dict[str, Any]:
    """The entries of params.yaml that a section shows."""
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(shown)
    return content


def definition(source: str, name: str) -> tuple[int, int]:
    """(first line, line past the last) of a definition at the top of a module, with its decorators."""
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
        if name in named:
            return node.lineno - 1, node.end_lineno or node.lineno
    raise AssertionError(f"no {name}")


def apply(block: Block, root: Path) -> None:
    """Put the lines of a block where its directive says."""
    path = root / block.path
    if block.how == "new file":
        assert not path.exists()
        path.write_text(block.lines)
        return
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    if block.how == "before":
        at = definition(source, block.where)[0]
        while lines[at - 1].startswith("#"):  # the comment of the definition stays with it
            at -= 1
        lines.insert(at, f"{block.lines}\n\n")
    elif block.how == "in":
        first, past = definition(source, block.where)
        at = next(n for n in range(first, past) if lines[n].rstrip().endswith("{"))
        lines.insert(at + 1, re.sub(r"^(?=.)", "    ", block.lines, flags=re.MULTILINE))
    elif block.how == "after":
        at = next(n for n, line in enumerate(lines) if line.strip() == block.where)
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines.insert(at + 1, re.sub(r"^(?=.)", indent, block.lines, flags=re.MULTILINE))
    else:
        name, fragment = block.where.split(": ", 1)
        first, past = definition(source, name)
        own = "".join(lines[first:past])
        assert fragment in own, f"{block.path}: {name} has no {fragment}"
        lines[first:past] = [own.replace(fragment, block.lines.strip(), 1)]
    path.write_text("".join(lines))
    ast.parse(path.read_text())


def write_images(path: Path) -> None:
    """60 images of 4 x 4 pixels; bright where the first half is, dark where the second half is."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(f"p{n}" for n in range(16)), "bright", "dark"])
        for row in range(60):
            bright, dark = row % 2, row // 2 % 2
            pixels = [200 * bright + row % 7] * 8 + [200 * (1 - dark) + row % 5] * 7 + [row]
            writer.writerow([*pixels, bright, dark])


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the project with all additions, taken through all stages; what that printed)."""
    root = toy.write_project(tmp_path_factory.mktemp("extended") / "project")
    write_images(root / "images.csv")
    (root / "mlp").mkdir()
    (root / "mlp" / "config.json").write_text(
        json.dumps({"model_type": "stillroom-mlp", "hidden_sizes": [8]})
    )
    params = toy.params(
        students={"fc": {"kind": "fc", "embedding": 8, "hidden": 8}, "perceptron": {"kind": "mlp"}},
        recipes={"kd": {"alpha": 0.5, "epochs": 1, "batch_rows": 16}},
        runs={},
    )
    for section in RUNS:
        text = sections()[section]
        for block in blocks(text):
            apply(block, root)
        for name, content in entries(text).items():
            params[name] = {**params[name], **content}
    params["caches"]["ranked-dense"] = {"dataset": "ranked", "teacher": "ranked"}
    toy.write_params(root, params)
    caches = list(dict.fromkeys(cache for _, cache in RUNS.values()))
    runs = [run for run, _ in RUNS.values()]
    steps = [
        ("prepare", list(params["datasets"])), ("teacher", list(params["teachers"])), ("cache", caches),
        ("verify", caches), ("train", runs), ("score", list(params["teachers"])), ("evaluate", runs),
        ("export", runs), ("report", [""]),
    ]  # fmt: skip
    (root / "drive.py").write_text(DRIVER)
    done = subprocess.run(
        [sys.executable, "drive.py", json.dumps(steps)], cwd=root, capture_output=True, text=True, check=False
    )
    shutil.rmtree(root / ".stillroom", ignore_errors=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout


@pytest.mark.parametrize("section", RUNS)
def test_an_addition_goes_through_every_stage(extended: tuple[Path, str], section: str) -> None:
    root, _ = extended
    run, cache = RUNS[section]
    assert json.loads((root / "verified" / f"{cache}.json").read_text())["replayed_rows"] > 0
    trained = json.loads((root / "models" / run / "training.json").read_text())
    assert trained["seeds"][0]["teacher_rows_seen"] > 0
    found = json.loads((root / "results" / "eval" / f"{run}.json").read_text())
    assert found["bytes"]["mean"] > 0
    assert (root / "exported" / run / "export.json").is_file()
    assert run in (root / "report" / "index.html").read_text()


def test_images_with_several_labels_are_measured_as_such(extended: tuple[Path, str]) -> None:
    found = json.loads((extended[0] / "results" / "eval" / "tagging.json").read_text())
    assert {"macro_f1", "micro_f1", "exact_match"} <= set(found)


def test_a_student_of_a_new_kind_is_exported(extended: tuple[Path, str]) -> None:
    assert (extended[0] / "exported" / "attention-kd" / "model.int8.onnx").is_file()


def test_a_nucleus_keeps_fewer_entries_where_the_teacher_is_sure(extended: tuple[Path, str]) -> None:
    code = (
        "from storage import Cache; cache = Cache.open('caches/nucleus'); rows = cache.read(cache.shards[0]);"
        "e = rows.entries; assert set(e.counts.tolist()) <= {1, 2};"
        "assert ((e.counts == 2) == (e.weights[e.offsets[:-1]] < 0.6)).all()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=extended[0], check=True)


def test_an_engine_refuses_what_it_cannot_give_before_a_model_is_loaded(extended: tuple[Path, str]) -> None:
    root, printed = extended
    assert "refused: the cache needs more than the engine 'ranked' can give" in printed
    assert not (root / "caches" / "ranked-dense").exists()


def test_the_table_counts_the_files_of_each_addition() -> None:
    table = dict(re.findall(r"^\| (an? [^|]+?) \| (\d+) \|", PAGE, flags=re.MULTILINE))
    titles = {"A task": "a task of known parts"} | {
        title: title.lower() for title in RUNS if title != "A task"
    }
    for section, text in sections().items():
        files = {block.path for block in blocks(text)}
        assert len(files) == int(table[titles[section]]), f"{section}: {sorted(files)}"


def test_a_page_is_a_page() -> None:
    for section, text in sections().items():
        assert text.count("\n") < 100, section
