"""Real processes are killed, stopped and starved while they capture: the sealed bytes are always the same."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline import crew
from tests.pipeline.conftest import World
from tests.pipeline.mishaps import MISHAPS

pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture(scope="module", autouse=True)
def _quick_processes() -> Iterator[None]:
    with crew.quick_processes():
        yield


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A capture that nothing disturbed."""
    made = world.copy(tmp_path_factory.mktemp("whole") / "world")
    crew.forget(made)
    crew.compute(made)
    return made


@pytest.fixture
def own(whole: World, tmp_path: Path) -> World:
    """The same project, with nothing captured."""
    made = whole.copy(tmp_path / "own")
    crew.forget(made)
    return made


def test_any_number_of_workers_gives_the_same_bytes(own: World, whole: World) -> None:
    for number in (1, 2, 3):
        crew.forget(own)
        assert crew.compute(own, crew.local(number)).computed_rows == crew.SHARD_ROWS * crew.SHARDS
        crew.check(own, crew.content(whole.cache))


@pytest.mark.parametrize("mishap", MISHAPS)
def test_a_capture_survives(
    own: World, whole: World, mishap: Callable[[World, random.Random], set[str]]
) -> None:
    kept = mishap(own, random.Random(0))
    crew.check(own, crew.content(whole.cache), kept)
