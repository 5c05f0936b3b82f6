"""The task stage: what one of several tasks learns from, by digest.

A run of several tasks depends on tasks/RUN, where each task has one small file: so it depends on exactly the
caches, datasets and recipes of its tasks, however many they are.
"""

import hashlib
from typing import Any

from pipeline.config import Run, RunPaths
from pipeline.config_recipes import Recipe
from pipeline.mixing import refuse_unverified
from storage.errors import DataError
from storage.mixture import open_cache

DATASET_FILES = ("rows.parquet", "summary.json")


def pinned(name: str, task: Run, recipe: Recipe, paths: RunPaths) -> dict[str, Any]:
    """What decides the part of this task in its run, as JSON.

    Raises SpecMismatch where its cache is not the one that was verified, DataError without its dataset.
    """
    cache = open_cache(paths.cache)
    refuse_unverified(cache, paths.verified)
    digests = {}
    for file in DATASET_FILES:
        if not (paths.dataset / file).is_file():
            raise DataError(
                f"tasks.{name}: there is no prepared dataset in {paths.dataset}.\n"
                f"Make it: dvc repro prepare@{task.dataset}. Or fetch it: dvc pull {paths.dataset}"
            )
        digests[file] = hashlib.sha256((paths.dataset / file).read_bytes()).hexdigest()
    return {
        "cache": {"name": task.cache, "manifest": cache.manifest_sha256},
        "dataset": {"name": task.dataset, **digests},
        "recipe": {"name": task.recipe, **recipe.model_dump(mode="json")},
    }
