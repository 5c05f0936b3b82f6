"""Toy BERTs for the tasks with a target a token, and a small project around one: data, teacher, store, cache.

Some words of the vocabulary are cut into two tokens, so that words and tokens are not the same.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Self

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.verify import verify_cache
from pipeline.config.caches import CacheEntry
from pipeline.config.datasets import Dataset
from pipeline.config.teachers import Teacher
from pipeline.data.prepare import prepare_dataset
from pipeline.data.rows import Rows, load_rows
from pipeline.teachers.prepare import prepare_teacher
from storage import Cache
from storage.writer import Store
from tests import toy

TAGS = ("O", "B-THING", "I-THING")
SPLIT = {"train": 0.6, "validation": 0.2, "test": 0.2}
CUT = {"ending": ("end", "##ing"), "script": ("scr", "##ipt"), "bright": ("br", "##ight")}
MOST = 32  # positions


def write(directory: Path, task: str, labels: tuple[str, ...] = TAGS, seed: int = 0) -> None:
    """A BERT of two layers with random weights for this task, as transformers saves it."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, BertTokenizerFast

    directory.mkdir(parents=True)
    whole = [word for word in toy.WORDS if word not in CUT]
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *whole,
        *(p for pair in CUT.values() for p in pair),
    ]
    (directory / "vocab.txt").write_text("\n".join(vocab) + "\n")
    BertTokenizerFast(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocab) + 7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=MOST, initializer_range=0.3,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    kind = BertForMaskedLM if task == "masked-lm" else BertForTokenClassification
    kind(config).save_pretrained(directory)


def tags(text: str) -> list[str]:
    """A tag for each word: things are films and plots, with what follows them."""
    words = text.split()
    before = ["", *words[:-1]]
    return ["B-THING" if w in toy.WORDS[10:12] else "I-THING" if b in toy.WORDS[10:12] else "O"
            for w, b in zip(words, before, strict=True)]  # fmt: skip


class Project:
    """A directory with rows, a model, and what is made of them."""

    def __init__(self, root: Path, task: str) -> None:
        self.root, self.task = root, task
        self.dataset, self.teacher, self.cache = root / "data", root / "teacher", root / "cache"

    @classmethod
    def start(cls, root: Path, task: str, num: int = 60) -> Self:
        """Rows and a model, prepared; no teacher yet."""
        own = cls(root, task)
        rows = [
            {"words": text.split(), "tags": tags(text), "text": text, "kind": "ab"[i % 2]}
            for i, text in enumerate(toy.texts(num))
        ]
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write(root / "model", task)
        own.prepare()
        return own

    def copy(self, to: Path) -> "Project":
        """The same project somewhere else, to be changed."""
        shutil.copytree(self.root, to)
        return Project(to, self.task)

    def prepare(self, **changes: Any) -> dict[str, Any]:
        entry: dict[str, Any] = {"task": self.task, "path": str(self.root / "rows.jsonl"), "split": SPLIT}
        if self.task == "token-classification":
            entry |= {"columns": {"text": "words", "label": "tags"}, "labels": list(TAGS)}
        return prepare_dataset("toy", Dataset.model_validate(entry | changes), self.dataset)

    def make_teacher(self, **changes: Any) -> dict[str, Any]:
        entry = {"model": str(self.root / "model"), "dataset": "toy", "max_length": MOST, **changes}
        return prepare_teacher("tiny", Teacher.model_validate(entry), self.dataset, self.teacher)

    def entry(self, **changes: Any) -> CacheEntry:
        entry = {"dataset": "toy", "teacher": "tiny", "precision": "float32", "shard_rows": 16}
        if self.task == "masked-lm":
            entry["targets"] = {"codec": "threshold", "tau": 0.1}
        return CacheEntry.model_validate(entry | changes)

    def job(self, **changes: Any) -> CaptureJob:
        store, entry = Store(self.root / "store"), self.entry(**changes)
        return CaptureJob("toy", entry, self.dataset, self.teacher, self.cache, store)

    def capture(self, **changes: Any) -> Captured:
        return capture_cache(self.job(**changes))

    def check(self, **changes: Any) -> dict[str, Any]:
        entry = self.entry(**changes)
        return verify_cache("toy", Cache.open(self.cache), entry, self.dataset, self.teacher)

    def rows(self) -> Rows:
        return load_rows(self.dataset)
