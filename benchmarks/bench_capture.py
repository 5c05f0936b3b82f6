"""Capture of a language model against its bare forward pass: positions a second, and memory at the peak.

SmolLM2-135M over film reviews of 256 tokens, threshold tau 0.07, compact. The bare pass computes all logits
of a batch and drops them; capture takes states through the head in chunks, keeps entries, packs and writes
shards. Each way runs in processes of its own, in turn. Last line: JSON.
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import numpy as np
import oracle
import pyarrow as pa
import torch

from pipeline import asking, capture, config_teachers, hardware, teachers
from pipeline.asking import Questions
from pipeline.prompts import prompts
from pipeline.tokens import Tokens
from storage import compact
from storage.spec import row_id
from storage.writer import Store

DOCUMENTS, SHARD_ROWS, ROUNDS = 8, 4, 3
ENTRY = config_teachers.CacheEntry.model_validate(
    {"dataset": "prose", "teacher": "smollm", "targets": "threshold"}
)


def questions() -> Questions:
    """The teacher as the teacher stage makes it, and some of the oracle's documents."""
    teacher = oracle.WHERE / "teacher"
    if not (teacher / teachers.RECORD).is_file():
        teacher.mkdir(parents=True, exist_ok=True)
        teachers.from_gguf(oracle.asset("smollm") / oracle.GGUF, teacher)
        record = {"task": "causal-lm", "labels": [], "vocab_size": 49_152, "max_length": 256}
        (teacher / teachers.RECORD).write_text(json.dumps(record | {"too_long": "error"}))
    documents = oracle.documents()[:DOCUMENTS]
    lengths = np.full(DOCUMENTS, documents.shape[1])
    tokens = Tokens(documents.reshape(-1).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]), 0)
    names = pa.array([row_id("bench", str(number)) for number in range(DOCUMENTS)])
    spec = capture.identity(ENTRY, teacher).spec
    return Questions(teacher, spec, prompts(spec.task, None, tokens, names, {}), names, 0)


def bare(known: Questions) -> None:
    """Every logit of every batch, dropped."""
    model = teachers.load_language(known.teacher, known.spec.precision)
    rows = np.arange(DOCUMENTS)

    def step() -> None:
        with torch.inference_mode():
            for start in range(0, DOCUMENTS, 4):
                ids, _ = known.tokens.padded(rows[start : start + 4], 0)
                model(torch.from_numpy(ids))

    common.tell_alone(step, 2)


def captured(known: Questions, directory: Path) -> None:
    """What the cache stage does, without reading texts."""
    who = capture.identity(ENTRY, known.teacher, "0" * 64)
    teaching = asking.asker(known._replace(spec=who.spec))
    ranks = np.arange(compact.MAX_RANKED)[: who.spec.num_outputs]
    teaching.load()

    def step() -> None:
        store = Store(directory / f"store-{time.monotonic_ns()}")
        rows = np.arange(DOCUMENTS)
        shards = [rows[start : start + SHARD_ROWS] for start in range(0, DOCUMENTS, SHARD_ROWS)]
        capture.ask_and_write(teaching, shards, store, who, ranks)

    common.tell_alone(step, 2)


def main() -> None:
    questions()
    seconds: dict[str, list[float]] = {"bare": [], "captured": []}
    peaks: dict[str, float] = {}
    for _ in range(ROUNDS):  # in turn, so that a slow minute of the machine hits both
        for way, times in seconds.items():
            spent, peak = common.alone(__file__, way)
            times.append(spent)
            peaks[way] = max(peaks.get(way, 0), peak)
    positions = DOCUMENTS * (oracle.LENGTH - 1)
    middle = {way: sorted(times)[ROUNDS // 2] for way, times in seconds.items()}
    for way, spent in middle.items():
        print(f"{way:9} {positions / spent:8,.0f} positions/s  {peaks[way] / 1e6:8,.0f} MB at the peak")
    common.close(
        {
            "ratio": middle["bare"] / middle["captured"],
            "peak_memory_ratio": peaks["captured"] / peaks["bare"],
            "positions_per_s": positions / middle["captured"],
        }
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        hardware.pin_threads(hardware.num_cores())
        with TemporaryDirectory() as place:
            bare(questions()) if sys.argv[1] == "bare" else captured(questions(), Path(place))
    else:
        main()
