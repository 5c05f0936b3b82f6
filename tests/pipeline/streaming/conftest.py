"""The project of two teachers, made once for all tests of this room: they read it, or change a copy."""

import pytest

from tests.pipeline.conftest import World
from tests.pipeline.two_teachers import NAMES, Two


@pytest.fixture(scope="session")
def two(world: World, tmp_path_factory: pytest.TempPathFactory) -> Two:
    made = Two(world.copy(tmp_path_factory.mktemp("two") / "own").root)
    made.records.mkdir()
    for seed, name in enumerate(NAMES):
        made.teach(name, seed + 1)
    made.mix(weights=(0.75, 0.25))
    return made
