"""A toy world for tests: a small real BERT with random weights, a small real dataset, params.yaml.

Everything is real but small: the same files, formats and code paths as the demo, in milliseconds.
"""

import csv
import random
import shutil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
WORDS = [
    "good",
    "bad",
    "fine",
    "dull",
    "bright",
    "slow",
    "warm",
    "cold",
    "sharp",
    "flat",
    "film",
    "plot",
    "scene",
    "actor",
    "story",
    "ending",
    "music",
    "script",
]
GOOD = {"good", "fine", "bright", "warm", "sharp"}
WIDTH, LAYERS = 16, 2


def texts(num: int, seed: int = 0) -> list[str]:
    """Distinct short texts of known words."""
    chosen = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < num:
        made[" ".join(chosen.choices(WORDS, k=chosen.randint(3, 12)))] = None
    return list(made)


def label(text: str) -> int:
    """1 where good words are at least as many as bad ones: something that a student can learn."""
    words = text.split()
    return int(2 * sum(word in GOOD for word in words) >= sum(word in WORDS[:10] for word in words))


def write_csv(path: Path, num: int = 120, seed: int = 0, pool: int = 60) -> None:
    """Columns text, label, source: `num` labelled rows of source "labelled", `pool` of source "pool"."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for index, text in enumerate(texts(num + pool, seed)):
            writer.writerow([text, label(text), "labelled" if index < num else "pool"])


def write_model(directory: Path, seed: int = 0, labels: tuple[str, ...] = ("negative", "positive")) -> None:
    """A BERT of two layers, 16 wide, with random weights and a word tokenizer, as transformers saves it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    directory.mkdir(parents=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocab) + "\n")
    BertTokenizerFast(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(seed)
    names = dict(enumerate(labels))
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32, id2label=names,
        label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)


def params(**changes: Any) -> dict[str, Any]:
    """A complete params.yaml over model/ and reviews.csv; `changes` replace whole shelves."""
    run = {"dataset": "toy", "cache": "toy", "seeds": [0, 1]}
    return {
        "assets": {},
        "datasets": {
            "toy": {
                "path": "reviews.csv",
                "where": {"source": "labelled"},
                "labels": ["negative", "positive"],
                "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
                "pool": {"where": {"source": "pool"}},
            }
        },
        "augmented": {},
        "teachers": {"tiny": {"model": "model", "dataset": "toy", "max_length": 32}},
        "caches": {
            "toy": {"dataset": "toy", "teacher": "tiny", "hidden": {"layers": [1, 2]}, "shard_rows": 32}
        },
        "mixtures": {},
        "students": {"fc": {"kind": "fc", "embedding": 8, "hidden": 8}},
        "recipes": {
            "ce": {"alpha": 1.0, "epochs": 2, "batch_rows": 16},
            "kd-pool": {"alpha": 0.5, "temperature": 2.0, "epochs": 2, "batch_rows": 16, "pool": True},
        },
        "runs": {
            "fc-ce": {**run, "student": "fc", "recipe": "ce"},
            "fc-kd-pool": {**run, "student": "fc", "recipe": "kd-pool"},
        },
        "export": {"int8_max_loss": 100.0},  # one of its few test rows is four points
        "workers": {},
    } | changes


def write_params(root: Path, content: dict[str, Any]) -> None:
    """Write root/params.yaml."""
    with (root / "params.yaml").open("w") as file:
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.dump(content, file)


def write_project(root: Path, **changes: Any) -> Path:
    """A project directory with the code, the graph, a model, a dataset and params.yaml; no git, no DVC."""
    root.mkdir(parents=True, exist_ok=True)
    for package in ("pipeline", "stages", "storage"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    write_csv(root / "reviews.csv")
    write_model(root / "model")
    write_params(root, params(**changes))
    return root
