"""Loads models: safetensors only, offline, and never code that comes with a model."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from pipeline.config.tasks import DEFAULT_TASK, TASKS
from pipeline.engines.model_files import check_no_own_code, weight_files
from pipeline.engines.sentence_encoder import SentenceEncoder
from pipeline.runtime import hardware
from pipeline.runtime.progress import tracked
from storage.errors import TeacherError
from storage.spec import EmbeddingSpec, ImageSpec
from storage.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ReadingSpec = ImageSpec | EmbeddingSpec
# For every call of from_pretrained: by default it asks on the terminal whether to run a model's own code.
OFFLINE = {"local_files_only": True, "trust_remote_code": False}


def load_classifier(
    directory: Path,
    num_labels: int | None = None,
    task: Task = DEFAULT_TASK,
    reading: ReadingSpec | None = None,
    **config: Any,
) -> "PreTrainedModel":
    """The classifier, regressor or encoder in `directory`, in float32 on the best device, in evaluation mode.

    With `num_labels` a checkpoint without a head gets one of that size, with random weights; so does a
    perceptron without weights. `reading`: how the model reads images or makes vectors, in these tasks.
    Raises AssetError or TeacherError.
    """
    if isinstance(reading, ImageSpec):
        return _load_images(directory, task, num_labels, reading, config)
    if num_labels:
        config["num_labels"] = num_labels
    model, missing = _load(directory, TASKS[task].auto_class, "classifier", dtype=torch.float32, **config)
    if isinstance(reading, EmbeddingSpec):
        missing = ", ".join(n for n in missing.split(", ") if n and not n.startswith("pooler."))
        model = SentenceEncoder(model, reading)
    if num_labels is None and missing:
        raise TeacherError(
            f"the model in {directory} is not a trained classifier: its weights lack {missing}.\n"
            "Take a trained one, or fine-tune it on labelled rows: teachers.NAME.train."
        )
    return model


def _load_images(
    directory: Path, task: Task, num_labels: int | None, reading: ImageSpec, config: dict[str, Any]
) -> "PreTrainedModel":
    from pipeline.engines.image_classifier import (
        ImageModel,
        has_weights,
        untrained_mlp,  # transformers, some seconds, and our perceptron's name in it
    )

    config = {key: value for key, value in config.items() if key != "pad_token_id"}
    if num_labels and not has_weights(directory):
        model, missing = untrained_mlp(directory, reading, **config), ""
    else:
        if num_labels:
            config["num_labels"] = num_labels
        auto_class = TASKS[task].auto_class
        model, missing = _load(directory, auto_class, "classifier", dtype=torch.float32, **config)
    if num_labels is None and missing:
        raise TeacherError(
            f"the model in {directory} is not a trained classifier: its weights lack {missing}.\n"
            "Take a trained one, or train it on labelled images: teachers.NAME.train."
        )
    return ImageModel(model, reading).to(hardware.device()).eval()


def load_language_model(
    directory: Path, precision: str, auto_class: str = "AutoModelForCausalLM"
) -> "PreTrainedModel":
    """The language model in `directory`, in this precision on the best device, in evaluation mode.

    `auto_class` is the class of transformers that loads it: TaskSpec.auto_class. Raises AssetError or
    TeacherError.
    """
    model, missing = _load(directory, auto_class, "language model", dtype=getattr(torch, precision))
    if missing:
        raise TeacherError(
            f"the model in {directory} is not a trained model for {auto_class}: its weights lack {missing}.\n"
            "Take a trained one."
        )
    return model


def input_embeddings(directory: Path) -> torch.Tensor:
    """The input embeddings [V, D] of the model in `directory`, on the CPU in float32. It may have no head.

    Raises AssetError or TeacherError.
    """
    from transformers import AutoModel

    model, missing = _from_files(AutoModel, directory, "transformers model", dtype=torch.float32)
    embeddings_VD: torch.Tensor = model.get_input_embeddings().weight.detach()
    if any("embed" in name for name in missing):
        raise TeacherError(f"the weights in {directory} lack the input embeddings.\nTake a complete model.")
    return embeddings_VD


def _load(directory: Path, auto_class: str, kind: str, **options: Any) -> "tuple[PreTrainedModel, str]":
    """(the model on the best device, the first names of weights that its files lack)."""
    import transformers

    model, missing = _from_files(getattr(transformers, auto_class), directory, kind, **options)
    return model.to(hardware.device()).eval(), ", ".join(missing[:4])


def _from_files(
    loader: Any, directory: Path, kind: str, **options: Any
) -> "tuple[PreTrainedModel, list[str]]":
    """(the model, names of weights that its files lack: transformers fills these with random numbers)."""
    from transformers import logging

    weight_files(directory)
    check_no_own_code(directory)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options |= {"use_safetensors": True, "output_loading_info": True, **OFFLINE}
    try:
        model, loaded = loader.from_pretrained(directory, **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise TeacherError(f"the model in {directory} cannot be loaded as a {kind}: {error}") from error
    return model, sorted(loaded["missing_keys"])


def convert_gguf(file: Path, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `out` as safetensors in bfloat16.

    Quantised weights are dequantised. Raises TeacherError where transformers cannot read it, or where tensors
    are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging
    from transformers import modeling_gguf_pytorch_utils as gguf_loader

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The loader has a progress bar that disable_progress_bar does not reach: ours takes its place.
    gguf_loader.tqdm = lambda tensors, **_: tracked(f"reading {file.name}", tensors, "tensors")
    options: dict[str, Any] = {"gguf_file": file.name, **OFFLINE}
    plain = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    try:
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(out)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            file.parent, output_loading_info=True, **plain, **options
        )
    except Exception as error:  # a damaged header can raise anything
        raise TeacherError(f"{file} cannot be loaded as a GGUF file: {error}") from error
    _check_complete(file, loaded["missing_keys"])
    model.save_pretrained(out)


def _check_complete(where: Path, names: Collection[str]) -> None:
    """Raise TeacherError where tensors are missing: transformers fills them with random numbers."""
    if names:
        raise TeacherError(
            f"{where} does not hold a complete language model: it lacks {', '.join(sorted(names)[:4])} "
            f"({len(names)} of its tensors).\nTake a complete one, with its vocabulary head."
        )
