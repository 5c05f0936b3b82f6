"""A capture is three steps, plan -> answer -> seal: each returns a value and knows nothing of the next."""

import shutil
from pathlib import Path

import pytest

from pipeline.capture import plan as planning
from pipeline.capture.answer import answer
from pipeline.capture.plan import plan
from pipeline.capture.seal import seal_cache
from pipeline.engines import classifier
from storage import Cache
from tests.imports import imported, modules
from tests.pipeline import crew
from tests.pipeline.capture.test_capture import no_teacher
from tests.pipeline.conftest import World


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path / "own")


def test_each_step_knows_the_steps_before_it_alone() -> None:
    steps = [f"pipeline.capture.{name}" for name in ("plan", "answer", "seal")]
    for place, name in enumerate(steps):
        assert not set(imported(modules()[name])) & set(steps[place + 1 :]), name
    assert not set(imported(modules()[steps[2]])) & {steps[1]}, "what is sealed may come from anywhere"


def test_a_plan_is_what_is_reused_and_what_is_missing_and_computes_nothing(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Cache.open(own.cache)
    gone = own.store.shard(before.identity, before.shards[1].key)
    assert gone is not None
    shutil.rmtree(gone.root)
    monkeypatch.setattr(classifier, "load_classifier", no_teacher)
    made = plan(own.job())
    assert made.identity == before.identity
    assert {shard.entry.key for shard in made.reused} == {shard.key for shard in before.shards} - {
        gone.entry.key
    }
    (rows,) = made.missing
    assert made.num_missing == gone.entry.rows
    assert made.inputs.row_ids.take(rows).to_pylist() == before.read(before.shards[1]).row_ids.to_pylist()


def test_answers_are_all_shards_of_the_cache_in_any_order_and_sealing_orders_them(own: World) -> None:
    before = crew.content(own.cache)
    crew.forget(own)
    planned = plan(own.job())
    assert planned.reused == []
    shards = answer(planned)
    assert sum(shard.entry.rows for shard in shards) == 180
    captured = seal_cache(planned, shards[::-1])
    assert captured.computed_rows == 180
    assert crew.content(own.cache) == before
    again = plan(own.job())
    assert (again.missing, answer(again)) == ([], again.reused)


def test_tables_are_fitted_once_and_pinned_the_same_for_the_plan_and_for_workers(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"targets": {"codec": "topk", "k": 1}, "hidden": {"layers": [2], "pca": 3}}
    entry = type(own.entry()).model_validate({**own.entry().model_dump(mode="json"), **changes})
    first = plan(own.job()._replace(entry=entry))
    monkeypatch.setattr(planning, "engine_for", lambda inputs: None)  # nothing is left to fit
    again = plan(own.job()._replace(entry=entry))
    assert again.identity == first.identity
    assert again.bare_identity == first.bare_identity != first.identity
    codec, hidden = first.identity.spec.codec, first.identity.spec.hidden
    assert codec != "dense"
    assert codec.ranks == first.tables.ranks_fingerprint is not None
    assert hidden is not None
    assert hidden.basis == first.tables.basis_fingerprint is not None
