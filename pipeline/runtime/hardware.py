"""The machine, and the setup of its arithmetic. The only file that sets torch's global switches.

Threads are pinned, so that the same program computes the same bits on the same kind of machine. torch is
imported where it is used: counting cores should not take seconds.
"""

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks() -> tuple[int, int]:
    """(rank of this process, number of processes) that torchrun started."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device() -> "torch.device":
    """The GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpus() -> list[str]:
    """The names in CUDA_VISIBLE_DEVICES of the GPUs that this process may use."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = torch.cuda.device_count()
    return named.split(",")[:number] if named else [str(index) for index in range(number)]


def pin_threads(threads: int) -> None:
    """Use this number of threads for arithmetic, and no tf32."""
    import torch

    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False


def compute_seconds() -> float:
    """A clock for differences: core-seconds of this process on a CPU, seconds on a GPU.

    Core-seconds add up over threads and do not count other programs on a shared machine.
    """
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def computes_in_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 here: CPUs with AMX or AVX512-BF16, GPUs since Ampere.

    Other CPUs emulate it: on an AMD EPYC of the Zen 3 generation bf16 autocast ran 8 times slower than
    float32.
    """
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def precision(setting: Literal["auto", "float32", "bfloat16"]) -> Literal["float32", "bfloat16"]:
    """The precision of a setting on this machine."""
    if setting == "auto":
        return "bfloat16" if computes_in_bfloat16() else "float32"
    return setting


def machine() -> str:
    """One line for reports: processor or GPU, and cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {num_cores()} cores"
    return f"{_cpu_name()}, {num_cores()} cores"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
