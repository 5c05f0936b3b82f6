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

from pipeline.capture.fitted_tables import FittedTables
from pipeline.capture.identity import capture_identity, with_tables
from pipeline.capture.shards import ShardWriter, answer_and_write
from pipeline.config.caches import CacheEntry
from pipeline.data.tokenizer import Tokens
from pipeline.engines.engine import EngineInputs
from pipeline.engines.loading import convert_gguf, load_language_model
from pipeline.engines.masking import teacher_tokens
from pipeline.engines.registry import engine_for
from pipeline.runtime import hardware
from pipeline.teachers.record import RECORD
from storage import compact
from storage.fingerprints import row_id
from storage.writer import Store

DOCUMENTS, SHARD_ROWS, ROUNDS = 8, 4, 3
ENTRY = CacheEntry.model_validate({"dataset": "prose", "teacher": "smollm", "targets": "threshold"})


def prepare_inputs() -> EngineInputs:
    """The teacher as the teacher stage writes it, and some of the oracle's documents."""
    teacher = oracle.WHERE / "teacher"
    if not (teacher / RECORD).is_file():
        teacher.mkdir(parents=True, exist_ok=True)
        convert_gguf(oracle.asset("smollm") / oracle.GGUF, teacher)
        record = {"task": "causal-lm", "labels": [], "vocab_size": 49_152, "max_length": 256}
        (teacher / RECORD).write_text(json.dumps(record | {"too_long": "error"}))
    documents = oracle.documents()[:DOCUMENTS]
    lengths = np.full(DOCUMENTS, documents.shape[1])
    tokens = Tokens(documents.reshape(-1).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]), 0)
    names = pa.array([row_id("bench", str(number)) for number in range(DOCUMENTS)])
    spec = capture_identity(ENTRY, teacher).spec
    return EngineInputs(teacher, spec, teacher_tokens(spec.task, None, tokens, names, {}), names, 0)


def bare(inputs: EngineInputs) -> None:
    """Computes every logit of every batch and drops them."""
    model = load_language_model(inputs.teacher, inputs.spec.precision)
    rows = np.arange(DOCUMENTS)

    def step() -> None:
        with torch.inference_mode():
            for start in range(0, DOCUMENTS, 4):
                batch = inputs.tokens.padded(rows[start : start + 4], 0)
                model(torch.from_numpy(batch["input_ids"]))

    common.measure_alone(step, 2)


def captured(inputs: EngineInputs, directory: Path) -> None:
    """Does the work of the cache stage, without reading texts."""
    bare = capture_identity(ENTRY, inputs.teacher)
    tables = FittedTables(np.arange(compact.MAX_RANKED)[: bare.spec.num_outputs], None, {})
    identity = with_tables(bare, tables.ranks_fingerprint, None)
    engine = engine_for(inputs._replace(spec=identity.spec))
    engine.load()

    def step() -> None:
        store = Store(directory / f"store-{time.monotonic_ns()}")
        rows = np.arange(DOCUMENTS)
        shards = [rows[start : start + SHARD_ROWS] for start in range(0, DOCUMENTS, SHARD_ROWS)]
        answer_and_write(engine, shards, ShardWriter(store, identity, tables))

    common.measure_alone(step, 2)


def main() -> None:
    prepare_inputs()
    seconds: dict[str, list[float]] = {"bare": [], "captured": []}
    peaks: dict[str, float] = {}
    for _ in range(ROUNDS):  # in turn, so that a slow minute of the machine affects both
        for way, times in seconds.items():
            spent, peak = common.run_alone(__file__, way)
            times.append(spent)
            peaks[way] = max(peaks.get(way, 0), peak)
    positions = DOCUMENTS * (oracle.LENGTH - 1)
    middle = {way: sorted(times)[ROUNDS // 2] for way, times in seconds.items()}
    for way, spent in middle.items():
        print(f"{way:9} {positions / spent:8,.0f} positions/s  {peaks[way] / 1e6:8,.0f} MB at the peak")
    common.print_result(
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
            bare(prepare_inputs()) if sys.argv[1] == "bare" else captured(prepare_inputs(), Path(place))
    else:
        main()
