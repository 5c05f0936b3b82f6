"""The chunked head loss against the dense one: seconds and peak memory of the head in a training step.

d = 192, 2,048 positions, 32 entries each (1 for labels), vocabularies of 49,152 and 262,144. The trunk is a
Llama of 4 layers, forward and backward. Every way runs in a process of its own, so that its peak memory is
its own. Last line: JSON for the smaller vocabulary.
"""

import json
import sys
from collections.abc import Callable

import common
import torch

from pipeline.losses.divergences import distillation_loss
from pipeline.losses.fused_linear import head_loss
from pipeline.losses.sparse import SparseTargets
from pipeline.runtime import hardware

WIDTH, POSITIONS, ENTRIES, LENGTH = 192, 2048, 32, 256
VOCABULARIES = (49_152, 262_144)
ROUNDS = 5


def targets(vocab: int, entries: int) -> SparseTargets:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(POSITIONS, entries, generator=generator)
    weights /= weights.sum(1, keepdim=True)
    ids = torch.randint(0, vocab, (POSITIONS * entries,), generator=generator)
    positions = torch.arange(POSITIONS).repeat_interleave(entries)
    return SparseTargets(positions, ids, weights.reshape(-1), torch.full((POSITIONS,), -torch.inf))


def head_step(way: str, vocab: int) -> Callable[[], object]:
    """One step of the head: loss and gradients of states and weights."""
    torch.manual_seed(0)
    states = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    head = torch.nn.Parameter(0.02 * torch.randn(vocab, WIDTH))
    if way == "dense":
        teacher_logits = torch.randn(POSITIONS, vocab)

        def dense() -> None:
            states.grad = head.grad = None
            distillation_loss(states @ head.T, teacher_logits).backward()

        return dense
    sparse = targets(vocab, 1 if way == "labels" else ENTRIES)

    def chunked() -> None:
        states.grad = head.grad = None
        (head_loss(states, head, sparse) / POSITIONS).backward()

    return chunked


def trunk_step() -> Callable[[], object]:
    """Forward and backward of the student without its head."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3
    )
    model, ids = LlamaModel(config), torch.zeros(POSITIONS // LENGTH, LENGTH, dtype=torch.int64)

    def step() -> None:
        model.zero_grad()
        model(ids).last_hidden_state.square().mean().backward()

    return step


def run(way: str, vocab: int) -> None:
    """Measures one way, in a process of its own."""
    hardware.pin_threads(hardware.num_cores())
    common.measure_alone(trunk_step() if way == "trunk" else head_step(way, vocab), ROUNDS)


def main() -> None:
    trunk, _ = common.run_alone(__file__, "trunk", "0")
    print(f"trunk alone: {trunk:.3f} s for {POSITIONS:,} positions")
    found = {}
    for vocab in VOCABULARIES:
        ways = {way: common.run_alone(__file__, way, str(vocab)) for way in ("dense", "labels", "entries")}
        for way, (seconds, peak) in ways.items():
            print(f"V = {vocab:7,}  {way:8} {seconds:7.3f} s  {peak / 1e6:8,.0f} MB at the peak")
        dense, labels, entries = (ways[way] for way in ("dense", "labels", "entries"))
        found[vocab] = {
            "speedup_over_dense": (trunk + dense[0]) / (trunk + entries[0]),
            "head_speedup_over_dense": dense[0] / entries[0],
            "peak_memory_ratio": entries[1] / dense[1],
            "distil_over_ce": (trunk + entries[0]) / (trunk + labels[0]),
            "step_over_trunk": (trunk + entries[0]) / trunk,
        }
        print(json.dumps({"vocabulary": vocab, **found[vocab]}))
    common.print_result(found[VOCABULARIES[0]])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], int(sys.argv[2]))
    else:
        main()
