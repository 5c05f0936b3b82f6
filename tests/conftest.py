"""For all tests: no network, and property tests that a busy machine cannot fail by being slow."""

import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("house", deadline=None, max_examples=60)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole chains under DVC come first: they take longest, and no process should be left alone with them."""
    items.sort(key=lambda item: "stages" not in item.path.parts)
