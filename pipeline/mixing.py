"""The mix stage: two verified caches, or mixtures of them, that a run reads as one."""

import json
from pathlib import Path

from pipeline.config_teachers import MixtureEntry
from storage import Cache
from storage.errors import Mismatch, SpecMismatch
from storage.mixture import Mixture, mix, open_cache


def make(name: str, entry: MixtureEntry, caches: Path, verified: Path) -> dict[str, str]:
    """Write the mixture `name` beside its caches; return the record that stands for its verification.

    Raises SpecMismatch where a cache is not the one that was verified, or cannot be averaged.
    """
    parts = {}
    for cache_name, weight in zip(entry.caches, entry.weights, strict=True):
        cache = open_cache(caches / cache_name)
        refuse_unverified(cache, verified / f"{cache_name}.json")
        parts[cache_name] = (cache, weight)
    return {"manifest": mix(caches / name, parts, entry.missing).manifest_sha256}


def refuse_unverified(cache: Cache, record: Path) -> None:
    """Raise SpecMismatch where this record of the verify stage (or of mix) is not of this cache."""
    known = json.loads(record.read_text())["manifest"] if record.is_file() else "nothing"
    if known != cache.manifest_sha256:
        raise SpecMismatch(
            f"{cache.path} is not the cache that was verified",
            [Mismatch("manifest", cache.manifest_sha256, known)],
            f"Verify it: dvc repro {'mix' if isinstance(cache, Mixture) else 'verify'}@{record.stem}",
        )
