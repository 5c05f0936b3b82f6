"""A small project of documents, with a language model as teacher."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.verify import verify_cache
from pipeline.config.caches import CacheEntry
from pipeline.config.datasets import Dataset
from pipeline.config.teachers import Teacher
from pipeline.data.prepare import prepare_dataset
from pipeline.data.tokenizer import TextReader
from pipeline.teachers.prepare import prepare_teacher
from storage import Cache
from storage.writer import Store
from tests import toy

V = 100


def write_language_model(directory: Path, vocab_size: int = V) -> None:
    """A Llama of two layers with random weights, and a word tokenizer of fewer ids than it has rows."""
    texts = toy.texts(50)
    reader = TextReader.learn(texts, 80, directory, 128)
    PreTrainedTokenizerFast(
        tokenizer_object=reader.tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


class Prose:
    """A small project: documents, a teacher, a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.dataset, self.teacher, self.cache = root / "data", root / "teacher", root / "cache"
        lines = [
            json.dumps({"text": f"{a} {b}"}) for a, b in zip(toy.texts(60), toy.texts(60, 7), strict=True)
        ]
        (root / "documents.jsonl").write_text("\n".join(lines) + "\n")
        write_language_model(root / "model")
        self.prepare()

    @classmethod
    def at(cls, root: Path) -> "Prose":
        """The project that `root` holds already."""
        own = cls.__new__(cls)
        own.root = root
        own.dataset, own.teacher, own.cache = root / "data", root / "teacher", root / "cache"
        return own

    @classmethod
    def copied(cls, root: Path, to: Path) -> "Prose":
        """The project in `root` somewhere else, to be changed."""
        shutil.copytree(root, to)
        return cls.at(to)

    def prepare(self) -> None:
        entry = {"task": "causal-lm", "path": str(self.root / "documents.jsonl")}
        entry |= {"split": {"train": 0.6, "validation": 0.2, "test": 0.2}}
        prepare_dataset("prose", Dataset.model_validate(entry), self.dataset)

    def make_teacher(self, **changes: Any) -> dict[str, Any]:
        entry = {"model": str(self.root / "model"), "dataset": "prose", "max_length": 128, **changes}
        return prepare_teacher("tiny", Teacher.model_validate(entry), self.dataset, self.teacher)

    def entry(self, **targets: Any) -> CacheEntry:
        chosen = targets or {"codec": "threshold", "tau": 0.1, "layout": "compact"}
        return CacheEntry.model_validate(
            {
                "dataset": "prose",
                "teacher": "tiny",
                "targets": chosen,
                "precision": "float32",
                "shard_rows": 16,
            }
        )

    def capture(self, **targets: Any) -> Captured:
        store, entry = Store(self.root / "store"), self.entry(**targets)
        return capture_cache(CaptureJob("prose", entry, self.dataset, self.teacher, self.cache, store))

    def check(self, **targets: Any) -> dict[str, Any]:
        entry = self.entry(**targets)
        return verify_cache("prose", Cache.open(self.cache), entry, self.dataset, self.teacher)
