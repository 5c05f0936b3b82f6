"""The verified inputs of a run: opens them, mixes caches (the mix stage), pins them (the task stage)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.caches import MixtureEntry
from pipeline.config.params import Run, RunInputs
from pipeline.config.recipes import Recipe
from pipeline.data.rows import POOL, Rows, load_rows
from storage import Cache
from storage.errors import DataError, Mismatch, SpecMismatch
from storage.mixture import Mixture, mix, open_cache

SKIPPED = "skipped"


def open_inputs(paths: RunInputs) -> tuple[Cache, Rows]:
    """The cache (or mixture) and the prepared rows of a run."""
    cache = open_cache(paths.cache, paths.local_bytes)
    return cache, open_rows(cache, paths.dataset)


def open_rows(cache: Cache, dataset: Path) -> Rows:
    """The prepared rows that a cache is read with.

    Rows to train on that a mixture skips have the split SKIPPED: none that anything selects.
    """
    rows = load_rows(dataset)
    if isinstance(cache, Mixture) and cache.missing == "skip":
        left_out = np.isin(rows.splits, ("train", POOL)) & ~cache.known(rows.row_ids)
        rows = rows._replace(splits=np.where(left_out, SKIPPED, rows.splits))
    return rows


def make_mixture(name: str, entry: MixtureEntry, caches: Path, verified: Path) -> dict[str, str]:
    """Write the mixture `name` next to its caches; return the record that stands for its verification.

    Raises SpecMismatch where a cache is not the one that was verified, or cannot be averaged.
    """
    parts = {}
    for cache_name, weight in zip(entry.caches, entry.weights, strict=True):
        cache = open_cache(caches / cache_name)
        check_verified(cache, verified / f"{cache_name}.json")
        parts[cache_name] = (cache, weight)
    return {"manifest": mix(caches / name, parts, entry.missing).manifest_sha256}


def check_verified(cache: Cache, record: Path) -> None:
    """Raise SpecMismatch where this record of the verify stage (or of mix) is not of this cache."""
    known = json.loads(record.read_text())["manifest"] if record.is_file() else "nothing"
    if known != cache.manifest_sha256:
        raise SpecMismatch(
            f"{cache.path} is not the cache that was verified",
            [Mismatch("manifest", cache.manifest_sha256, known)],
            f"Verify it: dvc repro {'mix' if isinstance(cache, Mixture) else 'verify'}@{record.stem}",
        )


DATASET_FILES = ("rows.parquet", "summary.json")


def pin_task_inputs(name: str, task: Run, recipe: Recipe, paths: RunInputs) -> dict[str, Any]:
    """What decides the part of this task in its run, as JSON.

    Raises SpecMismatch where its cache is not the one that was verified, DataError without its dataset.
    """
    cache = open_cache(paths.cache)
    check_verified(cache, paths.verified)
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
