"""For all tests: no network but an S3 server here; property tests do not fail on a busy machine."""

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import shared, warm
from tests.s3 import Server

gc.disable()  # while libraries are imported, which make objects that stay

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("house", deadline=None, max_examples=60)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole chains under DVC come first: they take longest, and no process should be left alone with them."""
    items.sort(key=lambda item: "stages" not in item.path.parts)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the environment must hold so that `python` and `dvc` start with their libraries imported."""
    with warm.using(shared.directory(tmp_path_factory) / "warm") as environment:
        yield environment


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One S3 server for all tests of this process."""
    server = Server(tmp_path_factory.mktemp("s3") / "log")
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The S3 server, for this test."""
    s3_server.use(monkeypatch)
    return s3_server
