"""Capture against the bare forward pass of the same batches: the cost of batching, checking and writing.

The model has MiniLM's shape (6 layers, 384 wide, 22.7 M parameters) and random weights; rows have the lengths
of the reviews. Also: emulated or native bfloat16 against float32. Last line: JSON with the ratios.
"""

import tempfile
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import torch
from transformers import BertConfig, BertForSequenceClassification

from pipeline.data.tokenizer import Tokens
from pipeline.engines.hidden_states import HiddenStateRecorder
from pipeline.engines.inference import TOKENS_PER_BATCH, InferenceRequest, batches_by_length, infer_rows
from pipeline.runtime import hardware
from pipeline.streaming.model_inputs import for_transformers, input_tensors
from storage import records
from storage.fingerprints import input_hash, row_id
from storage.spec import HiddenSpec, Identity, Spec, TeacherIdentity, TokenizerIdentity
from storage.writer import Store

ROWS, VOCAB, CLASSES = 512, 30_522, 2
HIDDEN = HiddenSpec(layers=(3, 6), pool="mean", width=384, dtype="float16")


def main() -> None:
    torch.manual_seed(0)
    hardware.pin_threads(hardware.num_cores())
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertForSequenceClassification(config).to(hardware.device()).eval()
    generator = np.random.default_rng(0)
    lengths = generator.integers(6, 42, ROWS)
    ids = generator.integers(1000, VOCAB, lengths.sum()).astype(np.int32)
    tokens = Tokens(ids, np.concatenate([[0], np.cumsum(lengths)]), 0)
    rows = np.arange(ROWS)
    names = [row_id("bench", str(i)) for i in rows]
    hashes = [input_hash(tokens.row(i)) for i in rows]
    device = hardware.device()
    batches = [
        for_transformers(input_tensors(tokens.padded(part, 0), device))
        for part in batches_by_length(tokens.lengths, TOKENS_PER_BATCH[device.type])
    ]

    def bare() -> None:
        with torch.inference_mode():
            for inputs in batches:
                model(**inputs)

    with tempfile.TemporaryDirectory() as directory:

        def captured() -> None:
            recorder = HiddenStateRecorder(model, HIDDEN, tokens.lengths, rows, names)
            request = InferenceRequest(tokens, rows, 0, row_ids=names)
            logits_NC = infer_rows(model, request, recorder.record)
            kept = records.LogitRows(pa.array(names), pa.array(hashes), lengths.astype(np.int32), logits_NC)
            Store(Path(directory) / str(np.random.randint(2**60))).put(_identity(), kept, recorder.found, 0.0)

        few = InferenceRequest(tokens, rows[:64], 0)
        half = {"bfloat16": lambda: infer_rows(model, few._replace(precision="bfloat16")),
                "float32": lambda: infer_rows(model, few)}  # fmt: skip
        seconds = common.medians({"bare": bare, "captured": captured}, rounds=5)
        precision = common.medians(half, rounds=3)
    print(f"bare forward   {ROWS / seconds['bare']:8,.0f} rows/s")
    print(f"capture        {ROWS / seconds['captured']:8,.0f} rows/s, with states of 2 layers and writing")
    common.print_result(
        {
            "ratio": seconds["bare"] / seconds["captured"],
            "bfloat16_over_float32": precision["float32"] / precision["bfloat16"],
            "rows_per_s": ROWS / seconds["captured"],
        }
    )


def _identity() -> Identity:
    digest = "0" * 64
    return Identity(
        capture_version=1,
        teacher=TeacherIdentity(weights=digest, config=digest),
        tokenizer=TokenizerIdentity(
            content=digest, vocab_size=VOCAB, special_tokens={"pad_token": 0}, padding_side="right"
        ),
        spec=Spec(
            task="sequence-classification",
            labels=("negative", "positive"),
            codec="dense",
            max_length=128,
            too_long="error",
            precision="float32",
            hidden=HIDDEN,
        ),
    )


if __name__ == "__main__":
    main()
