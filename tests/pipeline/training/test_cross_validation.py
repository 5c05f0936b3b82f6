"""Cross-validation: folds that never move, candidates that are sound, the best trained on all rows."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.load import load_params
from pipeline.config.params import Workers
from pipeline.config.recipes import Recipe
from pipeline.data.rows import POOL, Rows
from pipeline.streaming.verified import open_inputs
from pipeline.training import checks, processes
from pipeline.training.cross_validation import FoldScores, Trial, best_candidate, fold_of, hold_out_fold
from pipeline.training.job import Job
from pipeline.training.run import train_run, write_student_tokenizer
from pipeline.training.seed import train_seed
from storage.errors import ConfigError, DataError, SpecMismatch
from tests import toy
from tests.pipeline.conftest import World
from tests.pipeline.training.test_runs import untimed


def recipe(**fields: Any) -> Recipe:
    return Recipe.model_validate({"epochs": 2, "batch_rows": 16, "pool": True, **fields})


def train(world: World, out: Path, made: Recipe, name: str = "fc-kd-pool", **others: Any) -> dict[str, Any]:
    run = world.params.runs[name].model_copy(update=others)
    return train_run(
        name, run, world.params.students["fc"], made, world.run_paths(out), Workers(seeds_at_once=2)
    )


def test_lists_in_two_fields_are_the_grid_of_them() -> None:
    made = recipe(alpha=[0.0, 0.5], temperature=[1.0, {"schedule": "linear", "from": 1.0, "to": 2.0}])
    first, second = (value["temperature"] for value in made.grid[:2])
    assert [value["alpha"] for value in made.grid] == [0.0, 0.0, 0.5, 0.5]
    assert (first, str(second)) == (1.0, "linear from 1 to 2")
    chosen = made.chosen(made.grid[3])
    assert (chosen.alpha, chosen.temperature, chosen.grid) == (0.5, second, ())
    assert recipe(alpha=0.5).grid == ()
    assert Recipe(alpha=[0.25, 0.5]).grid == ({"alpha": 0.25}, {"alpha": 0.5})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"alpha": [0.5]}, "alpha: a list of 1 leaves no choice"),
        ({"alpha": []}, "alpha: a list of 0 leaves no choice"),
        ({"alpha": [0.5, 0.5]}, "'0.5' is listed twice"),
        ({"alpha": [0.5, 1.5]}, "recipes.kd-pool.alpha: Input should be less than or equal to 1 (found 1.5)"),
        ({"alpha": [0.5, 1.0]}, "alpha 1 trains on labels only"),
        ({"alpha": [0.5, {"schedule": "linear", "from": 0.0, "to": 2.0}]}, "between 0 and 1"),
        ({"pool": [True, False]}, "recipes.kd-pool.pool"),
        ({"alpha": [0.5, 0.6], "folds": 1}, "recipes.kd-pool.folds"),
        ({"alpha": [0.5, 0.6], "views": 1}, "alpha: a fold would be evaluated on rows whose views"),
    ],
)
def test_every_candidate_must_be_a_sound_recipe(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    shelves = copy.deepcopy(toy.params())
    shelves["recipes"]["kd-pool"] |= fields
    toy.write_params(tmp_path, shelves)
    with pytest.raises(ConfigError) as refused:
        load_params(tmp_path / "params.yaml")
    assert said in str(refused.value)


@given(st.sets(st.text("0123456789abcdef", min_size=4), min_size=2, max_size=40), st.integers(2, 7))
def test_a_fold_is_a_function_of_the_row_alone(row_ids: set[str], folds: int) -> None:
    for row_id in row_ids:
        fold = fold_of(row_id, folds)
        assert 0 <= fold < folds
        digest = hashlib.sha256(b"fold/" + row_id.encode()).digest()[:8]
        assert fold == int.from_bytes(digest, "little") % folds


def test_each_training_row_is_held_out_once_and_a_pool_row_never(world: World) -> None:
    rows = world.rows()
    judged: list[str] = []
    for fold in range(3):
        cut = hold_out_fold(rows, fold, 3)
        judged += cut.only("validation").row_ids.to_pylist()
        learned = cut.only("train", POOL).row_ids.to_pylist()
        assert not set(learned) & set(cut.only("validation").row_ids.to_pylist())
        assert set(rows.only(POOL).row_ids.to_pylist()) <= set(learned)
        untouched = rows.only("validation", "test").row_ids.to_pylist()
        assert not set(untouched) & set(cut.row_ids.to_pylist())
    assert sorted(judged) == sorted(rows.only("train").row_ids.to_pylist())


def test_a_fold_without_rows_is_refused(world: World) -> None:
    rows = world.rows().only("train")
    few = rows._replace(splits=np.where(np.arange(len(rows.splits)) < 2, "train", "test"))
    taken = {fold_of(row_id, 9) for row_id in few.row_ids.to_pylist()[:2]}
    empty = next(fold for fold in range(9) if fold not in taken)
    with pytest.raises(DataError, match=rf"fold {empty + 1} of 9 has 0 of 2 training rows"):
        hold_out_fold(few, empty, 9)


def test_the_best_mean_wins_and_ties_go_to_the_other_score_then_to_the_first() -> None:
    scores = [
        FoldScores([0.9, 0.5], [0.1, 0.1]),
        FoldScores([0.8, 0.8], [0.9, 0.9]),
        FoldScores([0.8, 0.8], [0.6, 0.4]),
        FoldScores([0.8, 0.8], [0.5, 0.5]),
    ]
    assert best_candidate(scores, by_loss=False) == 2
    assert best_candidate(scores, by_loss=True) == 0


def test_a_choice_is_recorded_whole_and_the_chosen_recipe_is_trained_as_if_written_so(
    world: World, tmp_path: Path
) -> None:
    made = recipe(alpha=[0.0, 0.75], temperature=2.0, folds=2)
    record = train(world, tmp_path / "chosen", made)
    choice = record["choice"]
    assert json.loads((tmp_path / "chosen" / "training.json").read_text()) == record
    assert (choice["folds"], choice["seed"], choice["judged_by"]) == (2, 0, "accuracy")
    assert [tried["values"] for tried in choice["candidates"]] == [{"alpha": 0.0}, {"alpha": 0.75}]
    scores = [FoldScores(tried["accuracy"], tried["loss"]) for tried in choice["candidates"]]
    assert all(len(score.score) == len(score.loss) == 2 for score in scores)
    assert choice["chosen"] == choice["candidates"][best_candidate(scores, by_loss=False)]["values"]
    names = sorted(path.name for path in (tmp_path / "chosen").iterdir())
    assert names == ["seed-0", "seed-1", "tokenizer", "training.json"]
    plain = train(world, tmp_path / "plain", recipe(**choice["chosen"], temperature=2.0))
    assert untimed(plain) == untimed(record)
    assert record["seeds"][0]["rows_seen"] == 2 * len(world.rows().select("train", POOL))


def test_a_score_is_that_of_a_training_on_the_other_folds(world: World, tmp_path: Path) -> None:
    """By hand: a dataset whose training rows are the other fold's, its validation rows this one's."""
    made = recipe(alpha=[0.25, 0.75], folds=2)
    choice = train(world, tmp_path / "chosen", made, seeds=(3,))["choice"]
    own = world.copy(tmp_path / "own")
    cut = hold_out_fold(own.rows(), 1, 2)
    table = pa.table(
        {"row_id": cut.row_ids, "text": cut.texts, "label": cut.labels, "split": list(cut.splits)}
    )
    pq.write_table(table, own.dataset / "rows.parquet")
    job = Job(3, 1, world.params.students["fc"], made.chosen({"alpha": 0.75}), own.run_paths(own.root))
    cache, _ = open_inputs(own.run_paths(own.root))
    write_student_tokenizer(job.student, cache, world.rows(), own.root / "tokenizer")
    done = train_seed(job)
    assert choice["candidates"][1]["accuracy"][1] == done.fit.best_accuracy
    assert choice["candidates"][1]["loss"][1] == done.fit.best_loss


def test_a_candidate_that_does_not_fit_the_cache_is_refused_before_the_first_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def refuse(what: str, codec: Any, divergence: str, temperature: Any) -> None:
        seen.append(temperature)
        if temperature != 1:
            raise SpecMismatch("refused", [], "")

    monkeypatch.setattr(checks, "check_truncated", refuse)
    with pytest.raises(SpecMismatch, match="refused"):
        train(world, tmp_path / "out", recipe(temperature=[1.0, 2.0]))
    assert seen == [1.0, 2.0]
    assert not (tmp_path / "out").exists()


def test_an_empty_fold_ends_a_run_before_the_first_step(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_start", lambda job: pytest.fail("a training was started"))
    with pytest.raises(DataError, match="nothing to judge"):
        train(world, tmp_path / "out", recipe(alpha=[0.0, 0.5], folds=10_000))


def test_a_failure_names_the_candidate_and_the_fold(world: World, tmp_path: Path) -> None:
    trial = Trial({"alpha": 0.5, "temperature": 2.0}, 1, 5)
    job = Job(0, 1, world.params.students["fc"], recipe(), world.run_paths(tmp_path), trial)
    assert job.label == "alpha 0.5, temperature 2.0, fold 2 of 5"
    assert job._replace(trial=None).label == "seed 0"


def test_rows_of_a_fold_keep_everything_else(world: World) -> None:
    rows: Rows = world.rows()
    cut = hold_out_fold(rows, 0, 2)
    assert cut.label_names == rows.label_names
    texts = dict(zip(rows.row_ids.to_pylist(), rows.texts.to_pylist(), strict=True))
    assert [texts[row_id] for row_id in cut.row_ids.to_pylist()] == cut.texts.to_pylist()
