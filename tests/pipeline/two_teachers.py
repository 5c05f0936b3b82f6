"""A project with the caches of two teachers over the same rows, and mixtures of them."""

import json
from pathlib import Path
from typing import Any

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.config.caches import MixtureEntry
from pipeline.config.params import RunInputs, Workers
from pipeline.streaming.verified import make_mixture
from pipeline.teachers.prepare import prepare_teacher
from pipeline.training.run import train_run
from storage import Cache
from storage.mixture import Mixture
from tests import toy
from tests.pipeline.conftest import World

NAMES = ("first", "second")
LABELS = ("negative", "positive")


class Two(World):
    """A project with the caches of two teachers over the same rows, and their mixture `both`."""

    @property
    def caches(self) -> Path:
        return self.root / "caches"

    @property
    def records(self) -> Path:
        return self.root / "verified"

    def teach(self, name: str, seed: int, labels: tuple[str, ...] = LABELS, **changes: Any) -> Cache:
        """The cache `name` of a teacher with other random weights, verified; `changes` are to its entry."""
        toy.write_model(self.root / f"model-{name}", seed, labels)
        entry = self.params.teachers["tiny"].model_copy(update={"model": str(self.root / f"model-{name}")})
        teacher = self.root / f"teacher-{name}"
        prepare_teacher(name, entry, self.dataset, teacher)
        capture_cache(
            CaptureJob(name, self.entry(**changes), self.dataset, teacher, self.caches / name, self.store)
        )
        cache = Cache.open(self.caches / name)
        (self.records / f"{name}.json").write_text(json.dumps({"manifest": cache.manifest_sha256}))
        return cache

    def mix(self, name: str = "both", caches: tuple[str, str] = NAMES, **fields: Any) -> Mixture:
        """The mixture of two caches, as the stage makes it."""
        entry = MixtureEntry.model_validate({"caches": caches, **fields})
        record = make_mixture(name, entry, self.caches, self.records)
        (self.records / f"{name}.json").write_text(json.dumps(record))
        return Mixture.open(self.caches / name)

    def paths(self, out: Path, name: str = "both") -> RunInputs:
        return RunInputs(self.caches / name, self.dataset, self.records / f"{name}.json", out)

    def train(self, out: Path, name: str = "both", **recipe: Any) -> dict[str, Any]:
        params = self.params
        run = params.runs["fc-kd-pool"].model_copy(update={"cache": name, "seeds": (0,)})
        made = params.recipes["kd-pool"].model_copy(update={"epochs": 1, **recipe})
        return train_run(
            "fc-both", run, params.students["fc"], made, self.paths(out, name), Workers(seeds_at_once=1)
        )

    def copy(self, to: Path) -> "Two":
        return Two(super().copy(to).root)
