"""For all tests: no network, and property tests that a busy machine cannot fail by being slow."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("house", deadline=None, max_examples=60)
settings.load_profile("house")
