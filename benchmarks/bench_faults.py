"""Captures by worker processes that are killed, stopped and starved of disk space, several times.

Each mishap of tests/pipeline/mishaps.py happens ROUNDS times to a capture of a toy teacher, 45 shards, at
another moment each time; one more fills a small file system, if the process may mount one. A capture
survives if the sealed bytes are those of an undisturbed one and no finished shard is missing. Last line:
JSON, all faults counted.
"""

import random
import shutil
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import common
import torch

from pipeline.runtime import hardware
from tests.pipeline import crew, mishaps
from tests.pipeline.conftest import make

ROUNDS = 2


def main() -> None:
    torch.set_num_threads(1)
    faults = survived = rows_lost = 0
    equal = True
    # As in the processes of crew.py: the provenance of caches records the number.
    one_core = patch.object(hardware, "num_cores", lambda: 1)
    with tempfile.TemporaryDirectory() as directory, crew.quick_processes(), one_core:
        whole = make(Path(directory, "whole"))
        crew.forget(whole)
        crew.compute(whole)
        undisturbed = crew.content(whole.cache)
        for turn in range(ROUNDS):
            for mishap, number in {**mishaps.MISHAPS, mishaps.full_file_system: 1}.items():
                world = whole.copy(Path(directory, f"{mishap.__name__}-{turn}"))
                crew.forget(world)
                started = time.perf_counter()
                try:
                    kept = mishap(world, random.Random(turn))
                except PermissionError as error:
                    print(f"{mishap.__name__}: left out, {error}")
                    continue
                lost, same = len(kept - crew.finished(world)), crew.content(world.cache) == undisturbed
                faults += number
                survived += number * (same and not lost)
                rows_lost += lost * crew.SHARD_ROWS
                equal &= same
                print(
                    f"{mishap.__name__}, round {turn + 1}: {number} x, {len(kept)} of {crew.SHARDS} "
                    f"shards finished before, {lost} of them lost, bytes {'equal' if same else 'DIFFER'}, "
                    f"{time.perf_counter() - started:.0f} s",
                    flush=True,
                )
                shutil.rmtree(world.root)
    common.print_result(
        {"faults": faults, "survived": survived, "rows_lost": rows_lost, "bytes_equal": equal}
    )


if __name__ == "__main__":
    main()
