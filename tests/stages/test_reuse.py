"""What runs again and what does not: real DVC over the toy project."""

import csv
import json
import os
from pathlib import Path

from pipeline.config.params import Export
from tests import toy
from tests.stages.conftest import Project


def test_the_whole_chain_runs_and_ends_with_a_report(finished: Project) -> None:
    ran = finished.first.stages
    assert ran == {
        "check", "prepare@toy", "teacher@tiny", "cache@toy", "verify@toy", "train@fc-ce", "train@fc-kd-pool",
        "evaluate@fc-ce", "evaluate@fc-kd-pool", "export@fc-ce", "export@fc-kd-pool", "score@tiny", "report",
    }  # fmt: skip
    page = (finished.root / "report" / "index.html").read_text()
    assert all(name in page for name in ("fc-ce", "fc-kd-pool", "teacher-tiny"))


def test_a_second_repro_runs_nothing_and_a_change_of_workers_computes_nothing(project: Project) -> None:
    assert project.repro().stages == set()
    project.params(workers={"seeds_at_once": 1})
    assert project.repro().stages == {"check"}, "which reads the whole of params.yaml, and changes nothing"


def test_sections_that_params_leaves_out_are_empty_and_exports_take_the_defaults(project: Project) -> None:
    own = ("datasets", "teachers", "caches", "students", "recipes", "runs")  # as in the README
    toy.write_params(project.root, {name: toy.params()[name] for name in own})
    exports = {"export@fc-ce", "export@fc-kd-pool"}
    assert project.repro().stages == {"check", *exports, "report"}, "the limit is the default now"
    record = json.loads((project.root / "results" / "limits.json").read_text())
    assert record == Export().model_dump()
    assert project.repro().stages == set()
    toy.write_params(project.root, {"datasets": toy.params()["datasets"]})
    alone = project.repro()
    assert (alone.code, alone.stages - {"report"}) == (0, {"check"})


def test_workers_of_this_machine_make_the_cache_that_one_process_made(
    project: Project, finished: Project
) -> None:
    cores = len(os.sched_getaffinity(0))
    project.params(workers={"capture": "local", "processes": 2, "threads": cores})
    assert project.repro().stages == {"check"}, "how work is spread changes no result"
    project.run("rm", "-rf", ".stillroom", "caches")
    done = project.stage("cache", "toy")
    assert done.returncode == 0, done.stderr
    assert "6 shards for 2 workers" in done.stderr
    assert project.files("caches/toy") == finished.files("caches/toy")


def test_a_changed_recipe_runs_only_its_runs(project: Project) -> None:
    recipes = toy.params()["recipes"]
    project.params(recipes=recipes | {"ce": recipes["ce"] | {"epochs": 3}})
    assert project.repro().stages == {"check", "train@fc-ce", "evaluate@fc-ce", "export@fc-ce", "report"}


def test_a_new_student_trains_only_its_run(project: Project) -> None:
    base = toy.params()
    runs = base["runs"] | {"small-ce": base["runs"]["fc-ce"] | {"student": "small"}}
    students = base["students"] | {"small": {"kind": "bilstm", "embedding": 4, "hidden": 4, "tokenizer": 40}}
    project.params(runs=runs, students=students)
    assert project.repro().stages == {
        "check", "train@small-ce", "evaluate@small-ce", "export@small-ce", "report",
    }  # fmt: skip


def read_csv(path: Path) -> list[list[str]]:
    """All lines of a csv file."""
    with path.open(newline="") as file:
        return list(csv.reader(file))


def write_csv(path: Path, lines: list[list[str]]) -> None:
    """Write lines as csv."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def test_twenty_appended_rows_cost_twenty_rows_and_a_mended_label_costs_none(project: Project) -> None:
    before, sealed = project.shards(), project.files("caches/toy/logits")
    lines = read_csv(project.root / "reviews.csv")
    lines[1][1] = str(1 - int(lines[1][1]))
    write_csv(project.root / "reviews.csv", lines)
    mended = project.repro("verify@toy")
    assert "180 of 180 rows are captured already" in mended.output
    assert project.shards() == before

    known = {line[0] for line in lines}
    new = [text for text in toy.texts(400, seed=7) if text not in known][:20]
    write_csv(
        project.root / "reviews.csv", lines + [[text, str(toy.label(text)), "labelled"] for text in new]
    )
    grown = project.repro("verify@toy")
    assert "180 of 200 rows are captured already" in grown.output
    after = project.shards()
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1
    logits = project.files("caches/toy/logits")
    assert {name: logits[name] for name in sealed} == sealed


def test_a_changed_spec_starts_clean_and_changing_it_back_costs_nothing(project: Project) -> None:
    before, sealed = project.shards(), project.files("caches/toy")
    entry = toy.params()["caches"]["toy"]
    project.params(caches={"toy": entry | {"hidden": {"layers": [0]}}})
    changed = project.repro("cache@toy")
    assert "0 of 180 rows are captured already" in changed.output
    assert set(before) < set(project.shards())
    project.params()
    weights = project.root / "teachers" / "tiny" / "model.safetensors"
    assert weights.is_file()
    back = project.repro("cache@toy")
    assert "rows are captured already" not in back.output or "180 of 180" in back.output
    assert project.files("caches/toy") == sealed


def test_metrics_and_plots_show_every_run(project: Project) -> None:
    shown = project.run("dvc", "metrics", "show").stdout
    assert "results/eval/fc-kd-pool.json" in shown
    assert "accuracy.mean" in shown
    project.run("dvc", "plots", "show", "-o", "plots")
    page = (project.root / "plots" / "index.html").read_text()
    assert "fc-kd-pool" in page
    assert "validation_accuracy" in page
