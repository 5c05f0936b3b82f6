"""Mixtures in the graph: made when one of their caches or weights changes, and only then."""

from tests import toy
from tests.stages.conftest import Project


def test_a_mixture_runs_again_where_its_caches_or_weights_change_and_only_there(project: Project) -> None:
    base = toy.params()
    run = base["runs"]["fc-kd-pool"] | {"cache": "both", "seeds": [0]}
    shelves = {
        "teachers": base["teachers"] | {"other": base["teachers"]["tiny"]},
        "caches": base["caches"] | {"more": base["caches"]["toy"] | {"teacher": "other"}},
        "mixtures": {"both": {"caches": ["toy", "more"]}},
        "runs": {**base["runs"], "fc-both": run},
    }
    project.params(**shelves)
    learned = {"check", "mix@both", "train@fc-both", "evaluate@fc-both", "export@fc-both", "report"}
    asked = {"teacher@other", "score@other", "cache@more", "verify@more"}
    assert project.repro().stages == asked | learned
    assert project.repro().stages == set()
    recipes = base["recipes"] | {"ce": base["recipes"]["ce"] | {"epochs": 1}}
    project.params(**shelves, recipes=recipes)
    assert project.repro().stages == {"check", "train@fc-ce", "evaluate@fc-ce", "export@fc-ce", "report"}
    weighed = {"both": {"caches": ["toy", "more"], "weights": [3.0, 1.0]}}
    project.params(**shelves | {"mixtures": weighed}, recipes=recipes)
    assert project.repro().stages == learned
    changed = shelves["caches"] | {"more": shelves["caches"]["more"] | {"hidden": {"layers": [0]}}}
    project.params(**shelves | {"mixtures": weighed, "caches": changed}, recipes=recipes)
    assert project.repro("train@fc-both").stages == {"cache@more", "verify@more", "mix@both", "train@fc-both"}
