"""Checkpoints: the state of a training on disk, from which a killed one continues to the same bits.

A checkpoint is one safetensors file: weights, the best weights so far, the optimizer's state of each
parameter and the states of random numbers; a few numbers are JSON in its header. It is written under another
name, flushed and renamed, so it is complete or absent. Nothing is unpickled. Training continues from it only
where everything that decides the training is unchanged: resume.py lists that.
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

    `kept` is the checkpoint of an earlier process; None where there is no file, or one that cannot be used,
    because it is damaged or of another training (other `facts`): a line on stderr about `label` says so.
    """

    def __init__(self, path: Path, label: str, facts: dict[str, str], every_seconds: float) -> None:
        self.path, self._label, self._facts, self._every = path, label, facts, every_seconds
        self.notes: dict[str, Any] = {}  # JSON that is saved with every checkpoint from now on
        self.kept = self._load()
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether the next checkpoint is due."""
        return time.monotonic() - self._saved >= self._every

    def save(self, tensors: Tensors, numbers: dict[str, Any]) -> None:
        """Replace the checkpoint; a line on stderr where it cannot be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"facts": json.dumps(self._facts), "numbers": json.dumps(numbers | {"notes": self.notes})}
        aside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, aside, metadata=header | {"digest": _digest(tensors, header)})
            fsync(aside)
            os.replace(aside, self.path)
            fsync(self.path.parent)
        except (OSError, SafetensorError) as error:  # a full disk does not end the training
            with contextlib.suppress(OSError):
                aside.unlink()
            self._log(f"could not be written ({error}); training continues")
        self._saved = time.monotonic()

    def _load(self) -> Checkpoint | None:
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            if header.pop("digest", None) != _digest(tensors, header):
                raise ValueError("its digest is another one")
            facts, numbers = json.loads(header["facts"]), json.loads(header["numbers"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            self._log(f"is damaged ({error}); training starts again")
            return None
        names = {**facts, **self._facts}
        if other := [name for name in names if facts.get(name) != self._facts.get(name)]:
            self._log(f"is of another {', '.join(other)}; training starts again")
            return None
        self.notes = numbers.pop("notes")
        return Checkpoint(tensors, numbers)

    def _log(self, what: str) -> None:
        log(f"{self._label}: the checkpoint {self.path} {what}")


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The state of an optimizer, as `optimizer.<parameter>.<name>`."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in _trainable(model)
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for place, (name, _) in enumerate(_trainable(model)):
        prefix = f"optimizer.{name}."
        state[place] = {key.removeprefix(prefix): value for key, value in tensors.items()
                        if key.startswith(prefix) and "." not in key.removeprefix(prefix)}  # fmt: skip
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names have this prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def random_state() -> torch.Tensor:
    """The state of this process's random numbers, as bytes: dropout draws from them."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state()]) if torch.cuda.is_available() else state


def restore_random_state(state: torch.Tensor) -> None:
    """The inverse of `random_state`."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())  # torch 2.13 crashes on a part of a larger tensor
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state[size:].clone())


def _trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Trainable parameters, in the order of the optimizer."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _digest(tensors: Tensors, header: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
