"""A student as ONNX: float32, and int8 by dynamic quantisation.

int8: weights and embeddings are kept in 8 bits, activations are rounded as they come (onnxruntime's dynamic
quantisation).
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxscript.optimizer import fold_constants

from pipeline.export.predictor import MODEL_FILES, ONNX_NAMES
from pipeline.streaming.model_inputs import call_model, inputs_of

FOLDED_BYTES = 2**31  # constants up to this size are computed at export
# A batch that a student is traced with, by the names of what it may read.
EXAMPLE = {
    "input_ids": torch.ones((2, 3), dtype=torch.int64),
    "attention_mask": torch.tensor([[True] * 3, [True, True, False]]),
}


def write_onnx(model: torch.nn.Module, out: Path) -> None:
    """Write a student as ONNX, in float32 and int8, into `out`. Both take any number of rows and tokens.

    One student with an LSTM a process: torch's exporter (2.13) changes how LSTMs are traced, and would refuse
    a second one for its fixed length.
    """
    reads = inputs_of(model)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _quietly():
        program = torch.onnx.export(
            _ByPosition(model).eval(), tuple(EXAMPLE[name] for name in reads), dynamo=True, verbose=False,
            input_names=[ONNX_NAMES.get(name, name) for name in reads], output_names=["logits"],
            dynamic_shapes=((any_size,) * len(reads),),
        )  # fmt: skip
        assert program is not None
        # torch reorders the gates of an LSTM by slicing its weights; only whole weights can be quantised
        fold_constants(program.model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES)
        proto = program.model_proto
        _remove_origin(proto)
        onnx.save(proto, out / MODEL_FILES["float32"])
        # unsigned: products of signed weights saturate on processors without VNNI, and cost accuracy there
        quantize_dynamic(proto, out / MODEL_FILES["int8"], weight_type=QuantType.QUInt8)


class _ByPosition(torch.nn.Module):
    """A student that takes the inputs that it reads in their order, as the exporter passes them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The student's logits [B, C]."""
        return call_model(self.model, dict(zip(inputs_of(self.model), inputs, strict=True)))


def _remove_origin(proto: onnx.ModelProto) -> None:
    """Remove the place in the source of each node (paths of this machine), and the shapes between nodes: the
    quantiser changes these and then finds them wrong.
    """
    graph = proto.graph
    graph.ClearField("value_info")
    for part in (proto, graph, *graph.node, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings and logs of the exporter."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
