"""Small projects for the tasks with one target a row: images, several labels, numbers, vectors."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.verify import verify_cache
from pipeline.config.caches import CacheEntry
from pipeline.config.datasets import Dataset
from pipeline.config.params import RunInputs
from pipeline.config.teachers import Teacher
from pipeline.data.prepare import prepare_dataset
from pipeline.teachers.prepare import prepare_teacher
from storage import Cache
from storage.writer import Store
from tests import toy

SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}
SHAPE = (4, 4, 1)


def write_images(path: Path, num: int = 80) -> None:
    """Grey images of 4 x 4 as lines of numbers, and a last column: whether the upper half is the brighter."""
    generator = np.random.default_rng(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        for row in generator.integers(0, 256, (num, 16)):
            writer.writerow([*row, int(row[:8].sum() > row[8:].sum())])


def write_texts(path: Path, num: int = 80) -> None:
    """Texts with a list of topics, a column of 0 and 1 for each, a length and a share."""
    with path.open("w") as file:
        for text in toy.texts(num):
            topics = [name for name in ("film", "plot", "good") if name in text.split()]
            words = text.split()
            row: dict[str, Any] = {"text": text, "topics": topics, "length": len(words) / 10}
            row |= {name: int(name in topics) for name in ("film", "plot", "good")}
            row["share"] = sum(word in toy.GOOD for word in words) / len(words)
            file.write(json.dumps(row) + "\n")


class World:
    """A directory with raw rows, a model, and what is made of them."""

    def __init__(self, root: Path, dataset: dict[str, Any], teacher: dict[str, Any]) -> None:
        self.root, self.teaching = root, {"dataset": "toy", "max_length": 32, **teacher}
        self.dataset, self.teacher, self.cache = root / "data", root / "teacher", root / "cache"
        self.entry = Dataset.model_validate({"split": SPLIT, **dataset})
        self.hidden: dict[str, Any] | None = None  # of the cache entry

    def prepare(self) -> dict[str, Any]:
        return prepare_dataset("toy", self.entry, self.dataset)

    def make_teacher(self, **changes: Any) -> dict[str, Any]:
        entry = Teacher.model_validate({**self.teaching, **changes})
        return prepare_teacher("tiny", entry, self.dataset, self.teacher)

    def caching(self) -> CacheEntry:
        entry = {"dataset": "toy", "teacher": "tiny", "precision": "float32", "shard_rows": 32}
        return CacheEntry.model_validate({**entry, "hidden": self.hidden})

    def capture(self) -> Captured:
        store = Store(self.root / "store")
        return capture_cache(CaptureJob("toy", self.caching(), self.dataset, self.teacher, self.cache, store))

    def check(self) -> dict[str, Any]:
        """Verify it, and keep the record where runs look for it."""
        found = verify_cache("toy", Cache.open(self.cache), self.caching(), self.dataset, self.teacher)
        (self.root / "verified.json").write_text(json.dumps(found))
        return found

    def all_of_it(self) -> "World":
        self.prepare()
        self.make_teacher()
        self.capture()
        self.check()
        return self

    def paths(self, out: Path) -> RunInputs:
        return RunInputs(self.cache, self.dataset, self.root / "verified.json", out)


def images(root: Path) -> World:
    """Images and a perceptron without weights."""
    write_images(root / "images.csv")
    (root / "mlp").mkdir()
    found = {"model_type": "stillroom-mlp", "hidden_sizes": [8]}
    (root / "mlp" / "config.json").write_text(json.dumps(found))
    return World(
        root,
        {
            "task": "image-classification", "path": str(root / "images.csv"), "header": False,
            "columns": {"image": None, "label": "16"}, "images": {"shape": SHAPE},
            "labels": ["lower", "upper"],
        },
        {"model": str(root / "mlp"), "train": {"epochs": 2, "batch_rows": 16, "learning_rate": 1e-2}},
    )  # fmt: skip


def several(root: Path, columns: Any = "topics") -> World:
    """Texts with several labels each, which `columns` tell, and a BERT to fine-tune."""
    write_texts(root / "rows.jsonl")
    names = ["film", "plot", "good"]
    toy.write_model(root / "model", labels=tuple(names))
    own = {"columns": {"label": columns}, "labels": names}
    task = {"task": "multi-label-classification", "path": str(root / "rows.jsonl"), **own}
    return World(root, task, {"model": str(root / "model"), "train": {"epochs": 1}})


def numbers(root: Path) -> World:
    """Texts with two numbers each, and a BERT to fine-tune."""
    write_texts(root / "rows.jsonl")
    toy.write_model(root / "model")
    own = {"columns": {"label": ["length", "share"]}, "labels": ["length", "share"]}
    task = {"task": "regression", "path": str(root / "rows.jsonl"), **own}
    return World(root, task, {"model": str(root / "model"), "train": {"epochs": 1}})


def vectors(root: Path, **teacher: Any) -> World:
    """Texts without labels, and a BERT that is taken as it is."""
    write_texts(root / "rows.jsonl")
    toy.write_model(root / "model")
    task = {"task": "sentence-embedding", "path": str(root / "rows.jsonl")}
    return World(root, task, {"model": str(root / "model"), **teacher})
