"""Two choices in the training of students: a mirrored backward LSTM, and one thread for each seed.

1. A training step of the BiLSTM with a mirrored backward LSTM against the usual packed sequences.
2. Two seeds in two processes of one thread each against one after the other on two threads.
Last line: JSON with the ratios (above 1: Stillroom's choice is faster).
"""

import multiprocessing as mp
import time

import common
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipeline.config.students import BiLSTMStudent
from pipeline.runtime import hardware
from pipeline.students.registry import build_student

VOCAB, BATCH, LENGTH = 30_522, 64, 26
ENTRY = BiLSTMStudent(kind="bilstm", embedding=128, hidden=128)


class Packed(nn.Module):
    """The usual BiLSTM: one bidirectional nn.LSTM over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, ENTRY.embedding)
        self.lstm = nn.LSTM(ENTRY.embedding, ENTRY.hidden, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4 * ENTRY.hidden, 2)

    def forward(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Logits [B, 2]."""
        lengths_B = mask_BL.sum(1)
        packed = pack_padded_sequence(
            self.embedding(ids_BL), lengths_B, batch_first=True, enforce_sorted=False
        )
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, padding_value=float("-inf"))
        mean = states.masked_fill(~mask_BL[..., None], 0.0).sum(1) / lengths_B[:, None]
        logits: torch.Tensor = self.head(torch.cat([states.amax(1), mean], dim=-1))
        return logits


def stepper(model: nn.Module, steps: int = 10):
    """A function that trains `model` for some steps on rows of 20 to 26 random tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids_BL = torch.randint(1, VOCAB, (BATCH, LENGTH))
    mask_BL = torch.arange(LENGTH) < torch.randint(20, LENGTH + 1, (BATCH,)).clamp(max=LENGTH)[:, None]
    mask_BL[0] = True

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(ids_BL, mask_BL).square().mean().backward()
            optimizer.step()

    return run


def work(threads: int, start) -> None:
    """Trains for some steps on `threads` threads, from the moment that `start` is set."""
    hardware.pin_threads(threads)
    run = stepper(build_student(ENTRY, VOCAB, 2))
    run()
    start.wait()
    for _ in range(5):
        run()


def together(processes: int, threads: int) -> float:
    """Seconds for `processes` trainings at once."""
    context = mp.get_context("spawn")
    start = context.Barrier(processes + 1)
    pool = [context.Process(target=work, args=(threads, start)) for _ in range(processes)]
    for process in pool:
        process.start()
    start.wait()
    started = time.perf_counter()
    for process in pool:
        process.join()
    return time.perf_counter() - started


def main() -> None:
    hardware.pin_threads(1)
    torch.manual_seed(0)
    ways = {"mirrored": stepper(build_student(ENTRY, VOCAB, 2)), "packed": stepper(Packed())}
    seconds = common.medians(ways)
    print(
        f"10 BiLSTM steps, one thread: mirrored {seconds['mirrored']:.3f} s, packed {seconds['packed']:.3f} s"
    )
    cores = hardware.num_cores()
    in_turn, parallel = [], []
    for _ in range(3):
        in_turn.append(cores * together(1, cores))
        parallel.append(together(cores, 1))
    in_turn.sort()
    parallel.sort()
    print(f"{cores} seeds: in turn on {cores} threads {in_turn[1]:.1f} s, in parallel {parallel[1]:.1f} s")
    common.print_result(
        {
            "mirrored_over_packed": seconds["packed"] / seconds["mirrored"],
            "side_by_side_over_threads": in_turn[1] / parallel[1],
        }
    )


if __name__ == "__main__":
    main()
