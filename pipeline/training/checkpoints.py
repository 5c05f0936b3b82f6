"""Where a training stands, on disk, so that a killed one goes on to the same bits.

A checkpoint is one safetensors file: weights, the best ones so far, what the optimizer keeps of each
parameter and the states of random numbers; a few numbers are JSON in its header. It is written aside, flushed
and renamed, so it is there whole or not at all. Nothing is ever unpickled. Training goes on from it only
where everything that decides the training is what it was: resuming.py names that.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.runtime.progress import log
from storage.disk import fsync

Tensors = dict[str, torch.Tensor]


class Checkpoint(NamedTuple):
    """The content of a checkpoint."""

    tensors: Tensors
    numbers: dict[str, Any]  # JSON


class Checkpointer:
    """The checkpoint of one training, at `path`.

    `kept` is what an earlier process left there; None where there is nothing, or nothing that can be used: a
    damaged file, or one that another training (other `facts`) wrote, which a line on stderr says of `label`.
    """

    def __init__(self, path: Path, label: str, facts: dict[str, str], every_seconds: float) -> None:
        self.path, self._label, self._facts, self._every = path, label, facts, every_seconds
        self.notes: dict[str, Any] = {}  # JSON that is kept with every checkpoint from now on
        self.kept = self._load()
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return time.monotonic() - self._saved >= self._every

    def save(self, tensors: Tensors, numbers: dict[str, Any]) -> None:
        """Replace the checkpoint by this one; a line on stderr where it cannot be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"facts": json.dumps(self._facts), "numbers": json.dumps(numbers | {"notes": self.notes})}
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside, metadata=header | {"digest": _digest(tensors, header)})
            fsync(aside)
            os.replace(aside, self.path)
            fsync(self.path.parent)
        except (
            OSError,
            SafetensorError,
        ) as error:  # the disk is full, perhaps: no reason to lose the training
            with contextlib.suppress(OSError):
                aside.unlink()
            self._say(f"could not be written ({error}); training goes on")
        self._saved = time.monotonic()

    def _load(self) -> Checkpoint | None:
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            if header.pop("digest", None) != _digest(tensors, header):
                raise ValueError("its bytes are not those that were written")
            facts, numbers = json.loads(header["facts"]), json.loads(header["numbers"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self._say(f"is damaged ({error}); training starts anew")
            return None
        names = {**facts, **self._facts}
        if other := [name for name in names if facts.get(name) != self._facts.get(name)]:
            self._say(f"is of another {', '.join(other)}; training starts anew")
            return None
        self.notes = numbers.pop("notes")
        return Checkpoint(tensors, numbers)

    def _say(self, what: str) -> None:
        log(f"{self._label}: the checkpoint {self.path} {what}")


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """What an optimizer keeps, as `optimizer.<parameter>.<what>`."""
    return {
        f"optimizer.{name}.{what}": value
        for name, parameter in _trained(model)
        for what, value in optimizer.state[parameter].items()
    }


def restore_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for place, (name, _) in enumerate(_trained(model)):
        prefix = f"optimizer.{name}."
        state[place] = {key.removeprefix(prefix): value for key, value in tensors.items()
                        if key.startswith(prefix) and "." not in key.removeprefix(prefix)}  # fmt: skip
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def random_state() -> torch.Tensor:
    """The state of this process's random numbers, bytes: dropout draws from them."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state()]) if torch.cuda.is_available() else state


def restore_random_state(state: torch.Tensor) -> None:
    """The inverse of `random_state`."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # of a part of a larger tensor torch 2.13 crashes
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state[size:].clone())


def _trained(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters in the order in which the optimizer has them."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _digest(tensors: Tensors, header: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
