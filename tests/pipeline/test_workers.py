"""x"""

import pytest, time
from tests.pipeline import crew
from tests.pipeline.conftest import World


@pytest.fixture
def own(world, tmp_path):
    return world.copy(tmp_path / "own")


def test_smoke(own: World) -> None:
    crew.forget(own)
    t = time.time()
    c = time.process_time()
    crew.compute(own, crew.INLINE)
    print("inline", time.time() - t, time.process_time() - c)
    want = crew.content(own.cache)
    with crew.quick_processes():
        for n in (1, 2):
            crew.forget(own)
            t = time.time()
            c = time.process_time()
            crew.compute(own, crew.local(n))
            print(n, time.time() - t, time.process_time() - c)
            assert crew.content(own.cache) == want
