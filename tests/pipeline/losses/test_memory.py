"""A vocabulary of 262,144 and 4,096 positions a batch fit in 2 GB beside the model, as the kernel sees."""

import json
import subprocess
import sys
from pathlib import Path

from tests import toy

CLEAR = Path("/proc/self/clear_refs")
LIMIT = 2 * 10**9  # bytes
V, POSITIONS = 262_144, 4096
# 4 rows of 1,025 tokens have 4,096 positions with a next token: as float32, their logits are 4.3 GB. A model
# of width 8 is small, so what grows is what is made of its states. The peak is the kernel's own (VmHWM),
# started again from what is held now by writing 5 to clear_refs.
PROGRAM = f"""
import json, re, resource
from pathlib import Path
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from pipeline.data.tokenizer import Tokens
from pipeline.engines import language_head
from pipeline.engines.inference import InferenceRequest
from pipeline.engines.language_model import infer_entries
from pipeline.streaming.model_inputs import input_tensors
from storage.codecs import Threshold

resource.setrlimit(resource.RLIMIT_DATA, (12 * 10**9, 12 * 10**9))  # too much ends this, and no other

def held(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def growth(rows, length):
    ids = np.random.default_rng(0).integers(0, {V}, rows * length).astype(np.int32)
    tokens = Tokens(ids, np.arange(rows + 1) * length, 0)
    has_target = np.arange(rows * length) % length < length - 1
    names, codec = [f"{{row:032x}}" for row in range(rows)], Threshold(layout="plain", tau=0.07, seed=0)
    request = InferenceRequest(tokens, np.arange(rows), 0, row_ids=names)
    Path("{CLEAR}").write_text("5")
    before = held("VmRSS")
    head.check(input_tensors(tokens.padded(np.arange(rows), 0)))
    entries, _ = infer_entries(head, request, has_target, codec)
    return held("VmHWM") - before, int((entries.counts > 0).sum())

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size={V}, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    max_position_embeddings=2048, initializer_range=1.0,
)
head = language_head.LanguageHead(LlamaForCausalLM(config).eval(), {V})
language_head.TOKENS_PER_BATCH["cpu"] = 4 * 1025
batches, states = [], head.states
head.states = lambda inputs: batches.append(inputs["attention_mask"].sum().item()) or states(inputs)
in_chunks, positions = growth(4, 1025)
in_one_batch = 4 * 1025 in batches
language_head.CHUNK_BYTES["cpu"] = 2**40
whole, few = growth(1, {POSITIONS // 8 + 1})
print(json.dumps([in_chunks, positions, in_one_batch, whole, few]))
"""


def test_the_logits_of_a_large_vocabulary_never_exist_at_once() -> None:
    """Memory grows by 0.3 GB. With all positions in one chunk it grew by 4.4 GB, and with a first check of
    512 tokens a row by 10.7 GB: this fails then.
    """
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=toy.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    in_chunks, positions, in_one_batch, whole, few = json.loads(done.stdout)
    assert (positions, in_one_batch, few) == (POSITIONS, True, POSITIONS // 8)
    assert whole > 0.9 * 4 * few * V, "an eighth of the matrix, made on purpose, is seen"
    assert in_chunks < LIMIT
