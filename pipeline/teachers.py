"""Teachers: their fingerprints, how they are loaded, what they are called by.

A teacher is a directory: config.json, *.safetensors, tokenizer.json, tokenizer_config.json, and after the
teacher stage teacher.json (its score and what it cost). Identities are read from the files alone, so that
asking whether anything is missing never loads a model. Weights are safetensors only; nothing is unpickled,
and code that comes with a model is never run.
"""

import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError

from pipeline import hardware
from pipeline.inputs import PixelReader, Reader
from pipeline.progress import tracked
from pipeline.tokens import TextReader
from pipeline.vectors import Embedder
from storage.errors import AssetError, TeacherError
from storage.spec import EmbeddingSpec, ImageSpec, Task, TeacherIdentity, sha256_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

How = ImageSpec | EmbeddingSpec
RECORD = "teacher.json"
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file: what its own library allows
# For all that transformers loads. Left to itself it asks on the terminal whether to run a model's code.
OFFLINE = {"local_files_only": True, "trust_remote_code": False}
# How transformers calls the models of each task.
MODELS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "multi-label-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "sentence-embedding": "AutoModel",
}
# Keys of config.json that say how a checkpoint was saved or where, and nothing about what it computes.
VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}


def identity(directory: Path) -> TeacherIdentity:
    """sha256 of the tensors (name, dtype, shape, bytes, in name order) and of the config. Loads no model."""
    config = _json(directory / "config.json", directory)
    meaning = {key: value for key, value in config.items() if key not in VOLATILE}
    return TeacherIdentity(weights=_weights_digest(directory), config=sha256_json(meaning))


def how(directory: Path) -> How | None:
    """How the teacher reads images or makes vectors, as the teacher stage recorded; None for all others."""
    found = record(directory)
    if "image" in found:
        return ImageSpec.model_validate(found["image"])
    return EmbeddingSpec.model_validate(found["embedding"]) if "embedding" in found else None


def reader(directory: Path) -> Reader:
    """The teacher's tokenizer with the maximum that the teacher stage recorded; of images, their size."""
    settings = record(directory)
    if isinstance(images := how(directory), ImageSpec):
        return PixelReader(math.prod(images.shape))
    return TextReader(directory, settings["max_length"], settings["too_long"])


def record(directory: Path) -> dict[str, Any]:
    """What the teacher stage wrote down: labels, maximum, score, cost."""
    return _json(directory / RECORD, directory)


def labels(directory: Path, override: tuple[str, ...] | None, expected: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the head's outputs, in order. Raises TeacherError where they are not the dataset's."""
    names = _json(directory / "config.json", directory).get("id2label", {})
    found = override or tuple(names[key] for key in sorted(names, key=int))
    if sorted(found) != sorted(expected):
        raise TeacherError(
            f"the teacher in {directory} does not speak of this dataset's labels.\n"
            f"  found    {list(found)}\n  expected {list(expected)} in any order\n"
            "Name its outputs in order under teachers.NAME.labels, or fine-tune it: teachers.NAME.train."
        )
    return found


def load(
    directory: Path,
    num_labels: int | None = None,
    task: Task = "sequence-classification",
    how: How | None = None,
    **config: Any,
) -> "PreTrainedModel":
    """The model in `directory` that answers rows, in float32 on the best device, ready for inference.

    With `num_labels` a head of that size is made where the checkpoint has none; a perceptron without weights
    gets random ones. `how`: how it reads images or makes vectors, in these tasks. Raises AssetError or
    TeacherError.
    """
    if isinstance(how, ImageSpec):
        return _load_images(directory, num_labels, how, config)
    if num_labels:
        config["num_labels"] = num_labels
    model, missing = _load(directory, task, "classifier", dtype=torch.float32, **config)
    if isinstance(how, EmbeddingSpec):
        missing = ", ".join(n for n in missing.split(", ") if n and not n.startswith("pooler."))
        model = Embedder(model, how)
    if num_labels is None and missing:
        raise TeacherError(
            f"the model in {directory} is no trained classifier: its weights lack {missing}.\n"
            "Take one that is, or fine-tune it on labelled rows: teachers.NAME.train."
        )
    return model


def _load_images(
    directory: Path, num_labels: int | None, how: ImageSpec, config: dict[str, Any]
) -> "PreTrainedModel":
    from pipeline import image_models  # transformers, some seconds, and our perceptron's name in it

    config = {key: value for key, value in config.items() if key != "pad_token_id"}
    if num_labels and not image_models.has_weights(directory):
        model, missing = image_models.untrained(directory, how, **config), ""
    else:
        if num_labels:
            config["num_labels"] = num_labels
        model, missing = _load(directory, "image-classification", "classifier", dtype=torch.float32, **config)
    if num_labels is None and missing:
        raise TeacherError(
            f"the model in {directory} is no trained classifier: its weights lack {missing}.\n"
            "Take one that is, or train it on labelled images: teachers.NAME.train."
        )
    return image_models.ImageModel(model, how).to(hardware.device()).eval()


def load_language(directory: Path, precision: str, task: Task = "causal-lm") -> "PreTrainedModel":
    """The language model in `directory`, in this precision on the best device, ready for inference.

    Raises AssetError or TeacherError.
    """
    model, missing = _load(directory, task, "language model", dtype=getattr(torch, precision))
    if missing:
        raise TeacherError(
            f"the model in {directory} is no trained {task} model: its weights lack {missing}.\n"
            "Take one that is."
        )
    return model


def input_embeddings(directory: Path) -> torch.Tensor:
    """The input embeddings [V, D] of the model in `directory`, on the CPU in float32; it needs no head.

    Raises AssetError or TeacherError.
    """
    from transformers import AutoModel

    model, missing = _from_files(AutoModel, directory, "transformers model", dtype=torch.float32)
    embeddings_VD: torch.Tensor = model.get_input_embeddings().weight.detach()
    if any("embed" in name for name in missing):
        raise TeacherError(f"the weights in {directory} lack the input embeddings.\nTake a complete model.")
    return embeddings_VD


def _load(directory: Path, task: Task, kind: str, **options: Any) -> "tuple[PreTrainedModel, str]":
    """(the model, names of weights that it lacks: transformers fills them with random numbers)."""
    import transformers

    model, missing = _from_files(getattr(transformers, MODELS[task]), directory, kind, **options)
    return model.to(hardware.device()).eval(), ", ".join(missing[:4])


def _from_files(
    loader: Any, directory: Path, kind: str, **options: Any
) -> "tuple[PreTrainedModel, list[str]]":
    """(the model, names of weights that it lacks: transformers fills them with random numbers)."""
    from transformers import logging

    weight_files(directory)
    refuse_own_code(directory)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options |= {"use_safetensors": True, "output_loading_info": True, **OFFLINE}
    try:
        model, loaded = loader.from_pretrained(directory, **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise TeacherError(f"the model in {directory} cannot be loaded as a {kind}: {error}") from error
    return model, sorted(loaded["missing_keys"])


def from_gguf(file: Path, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file into `out` as safetensors in bfloat16.

    Quantised weights are dequantised. Raises TeacherError where transformers cannot read it, or where tensors
    are missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging
    from transformers import modeling_gguf_pytorch_utils as gguf_loader

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The loader's own bar does not know that switch: it shows ours.
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
    _refuse_missing(file, loaded["missing_keys"])
    model.save_pretrained(out)


def _refuse_missing(where: Path, names: Collection[str]) -> None:
    """transformers fills what is missing with random numbers."""
    if names:
        raise TeacherError(
            f"{where} holds no whole language model: it lacks {', '.join(sorted(names)[:4])} "
            f"({len(names)} of its tensors).\nTake a complete one, with its vocabulary head."
        )


def _weights_digest(directory: Path) -> str:
    digest = hashlib.sha256()
    tensors: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in weight_files(directory):
        header, start = _header(path)
        tensors |= {name: (path, start, entry) for name, entry in header.items()}
    for name in sorted(tensors):
        path, start, entry = tensors[name]
        first, last = entry["data_offsets"]
        digest.update(f"{name}\x00{entry['dtype']}\x00{entry['shape']}\x00".encode())
        if last > first:
            digest.update(np.memmap(path, np.uint8, "r", start + first, (last - first,)).data)
    return digest.hexdigest()


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(what a safetensors file says of its tensors, where their bytes begin)."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {size:,} bytes")
            header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
    except (ValueError, RecursionError, AttributeError) as error:
        raise TeacherError(f"{path} is no safetensors file: {error}.\nFetch the model again.") from error
    return header, 8 + size


def weight_files(directory: Path) -> list[Path]:
    """The *.safetensors of a teacher, sorted. Raises AssetError where there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise AssetError(
            f"there are no weights in {directory}: expected *.safetensors.\n"
            "Weights in other formats can hold programs and are never opened: convert them (save_pretrained)."
        )
    return files


def refuse_own_code(directory: Path) -> None:
    """Raise TeacherError where a model is made of code that lies beside it: that is never run.

    A model that transformers knows loads without, even where its files name some.
    """
    from transformers import CONFIG_MAPPING

    config = _json(directory / "config.json", directory)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise TeacherError(
            f"the model in {directory} runs on code of its own: its config.json names {config['auto_map']}.\n"
            "Code that comes with a model is never run here, and transformers has no architecture "
            f"{config.get('model_type')!r}. Take one that it has, or answers from elsewhere."
        )


def _json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AssetError(
            f"{path} is missing: {directory} is no teacher.\n"
            f"Make it with `dvc repro teacher@{directory.name}`, or name the right directory in params.yaml."
        )
    content: dict[str, Any] = json.loads(path.read_text())
    return content
