"""Records hidden states, and queries, keys and values of attention, with forward hooks.

The model is called as it always is: the hooks copy what passes by. PLACES lists where each architecture has
the projections of its attention; a model that has them nowhere there is refused before its first batch.

Shape letters: N rows, P positions of all rows, B batch, L tokens, W width, M components.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.losses.features import pool_states
from pipeline.streaming.model_inputs import InputTensors
from storage.entries import ends, ranges
from storage.errors import TeacherError
from storage.hidden import Basis
from storage.spec import QKV_PARTS, HiddenSpec

Indices = npt.NDArray[np.int64]
# Takes the places of a batch's rows and what the model reads of them; entered around the model's call.
Record = Callable[[Indices, InputTensors], AbstractContextManager[None]]

# The modules that hold the projections of attention block n (counted from 0), and their names, in order.
PLACES = (
    ("encoder.layer.{}.attention.self", ("query", "key", "value")),  # BERT and models built like it
    ("transformer.layer.{}.attention", ("q_lin", "k_lin", "v_lin")),  # DistilBERT
    (
        "layers.{}.self_attn",
        ("q_proj", "k_proj", "v_proj"),
    ),  # Llama and models built like it: before rotary embeddings
    ("h.{}.attn", ("c_attn",)),  # GPT-2: one projection makes all three
)


def no_recording(batch: Indices, inputs: InputTensors) -> AbstractContextManager[None]:
    """Records nothing."""
    return contextlib.nullcontext()


class HiddenStateRecorder:
    """Records the hidden states of some rows that `spec` names, a batch at a time, into `found`.

    Raises TeacherError where the model does not have such projections, and where a state is not finite: that
    error names the row.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        spec: HiddenSpec,
        lengths: Indices,
        rows: Indices,
        names: Sequence[str] | None = None,
    ) -> None:
        self.found: dict[str, npt.NDArray[np.float32]] = {}  # name -> N x W pooled, P x W row after row
        self._model, self._spec = model, spec
        self._projections = {f"qkv.{block}": projections(model, block, spec.width) for block in spec.qkv}
        self._lengths, self._rows, self._names = lengths, rows, names
        self._first = ends(lengths)

    @contextlib.contextmanager
    def record(self, batch: Indices, inputs: InputTensors) -> Iterator[None]:
        """Record the states of these rows. Within, the model is called once on them."""
        with self._hooks() as recorded:
            yield
        mask_BL = inputs["attention_mask"]
        for name in self._spec.names:
            states_BLW = torch.cat(recorded[name], -1).float()
            kept = pool_states(states_BLW, mask_BL, self._spec.pool).cpu().numpy()
            places, owners = batch, batch
            if self._spec.pool == "none":
                lengths = self._lengths[batch]
                places, owners = ranges(self._first[batch], lengths), np.repeat(batch, lengths)
            check_finite(kept, f"hidden state {name}", self._rows[owners], self._names)
            if name not in self.found:
                total = int(self._first[-1]) if self._spec.pool == "none" else len(self._lengths)
                self.found[name] = np.empty((total, kept.shape[1]), np.float32)
            self.found[name][places] = kept

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[dict[str, list[torch.Tensor]]]:
        recorded: dict[str, list[torch.Tensor]] = {name: [] for name in self._spec.names}

        def ask_for_states(
            _: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**options, "output_hidden_states": True}

        def keep_states(_: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
            for layer in self._spec.layers:
                recorded[f"layer.{layer}"].append(out.hidden_states[layer])

        with contextlib.ExitStack() as hooks:
            handles = [
                module.register_forward_hook(_keep_into(recorded[name]))
                for name, modules in self._projections.items()
                for module in modules
            ]
            if self._spec.layers:
                handles.append(self._model.register_forward_pre_hook(ask_for_states, with_kwargs=True))
                handles.append(self._model.register_forward_hook(keep_states))
            for handle in handles:
                hooks.callback(handle.remove)
            yield recorded


def projections(model: torch.nn.Module, block: int, width: int) -> list[torch.nn.Module]:
    """The modules whose outputs, concatenated, are queries, keys and values [B, L, 3 x width] of an attention
    block (1 is the first).

    Raises TeacherError where the architecture is unknown, where it has several such blocks, and where the
    projections are not `width` wide (grouped queries share narrower keys and values).
    """
    modules, kind = dict(model.named_modules()), type(model).__name__
    for place, parts in PLACES:
        behind = [f".{place.format(block - 1)}.{part}" for part in parts]
        found = [module for end in behind for name, module in modules.items() if f".{name}".endswith(end)]
        if len(found) != len(parts):
            continue
        widths = [getattr(module, "out_features", None) or module.nf for module in found]
        if widths != [QKV_PARTS * width // len(parts)] * len(parts):
            raise TeacherError(
                f"hidden.qkv: {kind} projects its states of {width} numbers to {widths} numbers in block "
                f"{block}.\nExpected queries, keys and values of the width of the states (grouped queries "
                "share keys and values). Keep hidden.layers of this teacher, or take one without."
            )
        return found
    raise TeacherError(
        f"hidden.qkv: the queries, keys and values of block {block} are not found in {kind}.\n"
        "Known are BERT, DistilBERT, Llama, GPT-2 and models built like them. Keep hidden.layers of this "
        "teacher, or take another one."
    )


def principal_components(states_NW: npt.NDArray[np.float32], num: int) -> Basis:
    """The mean and the first `num` principal axes of these states [N, W] (PCA): they lose least.

    The mean squared distance of a state from mean + components @ axes is the sum of the eigenvalues of the
    covariance that are left out. An axis points where its largest number is positive.
    """
    exact = states_NW.astype(np.float64)
    mean = exact.mean(axis=0)
    apart = exact - mean
    axes = np.linalg.eigh(apart.T @ apart / len(apart)).eigenvectors[:, ::-1][:, :num].T
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return Basis(mean.astype(np.float32), np.ascontiguousarray(axes * np.sign(largest), np.float32))


def check_finite(
    output: npt.NDArray[np.float32], what: str, rows: Indices, names: Sequence[str] | None
) -> None:
    """Raise TeacherError where an output [N, ...] is not finite, with the first such row of `rows` [N]."""
    finite = np.isfinite(output).all(axis=1)
    if finite.all():
        return
    row = rows[int(np.flatnonzero(~finite)[0])]
    raise TeacherError(
        f"the teacher's {what} for row {names[row] if names is not None else row} are not finite "
        f"({len(np.unique(rows[~finite]))} of the {len(np.unique(rows))} rows in its batch).\n"
        "Finished shards are kept. Look at that row; if the arithmetic overflows, set precision: float32."
    )


def _keep_into(recorded: list[torch.Tensor]) -> Callable[[torch.nn.Module, Any, torch.Tensor], None]:
    def keep(_: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        recorded.append(out)

    return keep
