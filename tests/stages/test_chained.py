"""Runs that start from another run, under real DVC: in order, and again when that run changes."""

from tests import toy
from tests.stages.conftest import Project


def test_a_chained_run_follows_the_run_that_it_starts_from(project: Project) -> None:
    shelves = toy.params()
    first = {**shelves["runs"]["fc-ce"], "recipe": "kd-pool"}
    chained = {"last": {**first, "init": "middle"}, "middle": {**first, "init": "fc-ce"}}
    project.params(chained=chained)
    after = {f"{stage}-after@{name}" for stage in ("train", "evaluate", "export") for name in chained}
    assert project.repro().stages == {"check", *after, "report"}
    record = (project.root / "models" / "last" / "training.json").read_text()
    assert '"started_from": "middle/seed-1"' in record
    assert "middle" in (project.root / "report" / "index.html").read_text()
    assert project.repro().stages == set()

    ce = shelves["recipes"]["ce"]
    project.params(chained=chained, recipes=shelves["recipes"] | {"ce": ce | {"epochs": 3}})
    again = project.repro()
    assert again.stages == {"train@fc-ce", "evaluate@fc-ce", "export@fc-ce", *after, "check", "report"}
    ran = [line for line in again.output.splitlines() if line.startswith("Running stage 'train")]
    names = [line.split("'")[1] for line in ran]
    assert names == ["train@fc-ce", "train-after@middle", "train-after@last"]
