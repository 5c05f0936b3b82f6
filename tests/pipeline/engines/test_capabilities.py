"""A cache that needs more than its engine states to give is refused before a teacher is loaded."""

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pytest

from pipeline.engines.engine import Capabilities, EngineInputs, EngineOutput
from pipeline.engines.registry import ENGINES
from storage import Cache
from storage.entries import Entries
from storage.errors import TeacherError
from storage.records import EntryRows
from tests.pipeline import crew
from tests.pipeline.conftest import World

MOST = 2  # log-probabilities a row


class TopKEngine:
    """A server that returns the two largest log-probabilities of a row. They follow from the row's length."""

    capabilities: ClassVar = Capabilities(full_logits=False, hidden_states=False, top_k=MOST)

    def __init__(self, inputs: EngineInputs) -> None:
        self._inputs = inputs

    def load(self) -> None:
        self._inputs.before_loading()

    def for_rows(self, inputs: EngineInputs) -> Self:
        return type(self)(inputs)

    def probability_mass(self, num_targets: int) -> np.ndarray:
        return self._largest(np.arange(min(num_targets, len(self._inputs.row_ids)))).sum(0)

    def answer(self, part: np.ndarray, advance: Any = lambda rows: None) -> EngineOutput:
        q, codec, num = self._inputs, self._inputs.spec.codec, len(part)
        assert codec != "dense"
        assert codec.name == "topk"
        probabilities = self._largest(part)
        order = np.argsort(-probabilities, axis=1)[:, : codec.k]
        weights = np.take_along_axis(probabilities, order, axis=1)
        with np.errstate(divide="ignore"):
            rest = np.log(np.maximum(1 - weights.sum(1), 0)).astype(np.float32)
        entries = Entries(
            np.arange(num + 1) * codec.k, order.reshape(-1).astype(np.int32),
            weights.reshape(-1).astype(np.float32), np.full(num, codec.k, np.int32), rest,
        )  # fmt: skip
        lengths = q.inputs.lengths[part].astype(np.int32)
        row_ids = q.row_ids.take(pa.array(part))
        kept = EntryRows(row_ids, q.inputs.hashes(part), lengths, np.ones(num, np.int32), entries)
        advance(num)
        return EngineOutput(kept, None, {})

    def _largest(self, part: np.ndarray) -> np.ndarray:
        good = 1 / (1 + self._inputs.inputs.lengths[part].astype(np.float64))
        return np.stack([1 - good, good], axis=1)


@pytest.fixture
def own(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The toy project with nothing captured, and its teacher run by the toy engine."""
    made = world.copy(tmp_path / "own")
    crew.forget(made)
    monkeypatch.setitem(ENGINES, "rows", TopKEngine)
    return made


def entry(own: World, **changes: Any) -> Any:
    body = own.entry().model_dump(mode="json") | {"hidden": None} | changes
    return type(own.entry()).model_validate(body)


def test_every_engine_states_what_it_can_give() -> None:
    for engine in ENGINES.values():
        assert engine.capabilities == Capabilities(full_logits=True, hidden_states=True)


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, ["targets  found dense, expected topk with k up to 2"]),
        ({"targets": "threshold"}, ["targets  found threshold, expected topk"]),
        ({"targets": "sample"}, ["targets  found sample, expected topk"]),
        ({"targets": {"codec": "topk", "k": 3}}, ["targets  found topk with k 3, expected topk with k"]),
        ({"targets": {"codec": "topk", "k": 1}, "hidden": {"layers": [1, 2]}},
         ["hidden   found layer.1, layer.2, expected none"]),
        ({"hidden": {"layers": [1]}}, ["targets  found dense", "hidden   found layer.1"]),
    ],
)  # fmt: skip
def test_a_capture_that_needs_more_than_the_engine_gives_is_refused_before_the_teacher_is_loaded(
    own: World, changes: dict[str, Any], faults: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TopKEngine, "load", lambda self: pytest.fail("the teacher was loaded"))
    chosen = entry(own, **changes)
    monkeypatch.setattr(World, "entry", lambda self: chosen)
    with pytest.raises(TeacherError, match="needs more than the engine 'rows' can give") as refused:
        own.capture()
    lines = str(refused.value).splitlines()
    assert len(lines) == 2 + len(faults)
    for line, fault in zip(lines[1:-1], faults, strict=True):
        assert line.startswith(f"  {fault}")
    assert not own.store.root.exists()


@pytest.mark.parametrize("layout", ["plain", "compact"])
def test_what_an_engine_of_top_k_alone_can_give_is_captured_and_verified(
    own: World, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = entry(own, targets={"codec": "topk", "k": 1, "layout": layout})
    monkeypatch.setattr(World, "entry", lambda self: made)
    assert own.capture().computed_rows == 180
    cache = Cache.open(own.cache)
    first = cache.read(cache.shards[0])
    assert isinstance(first, EntryRows)
    expected = 1 - 1 / (1 + first.num_tokens.astype(np.float64))
    assert np.asarray(first.entries.weights) == pytest.approx(expected, abs=0.03)
    assert own.check()["replayed_rows"] == 180
