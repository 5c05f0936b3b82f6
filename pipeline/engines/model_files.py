"""A teacher's files: their fingerprint, read without loading the model, and files that are refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import AssetError, TeacherError
from storage.fingerprints import sha256_json
from storage.spec import TeacherIdentity

MAX_HEADER_BYTES = 100_000_000  # of a safetensors file: the limit of its own library
# Keys of config.json about where and how a checkpoint was saved: they change nothing that it computes.
VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"}


def teacher_identity(directory: Path) -> TeacherIdentity:
    """sha256 of the tensors (name, dtype, shape, bytes, in name order) and of the config. Loads no model."""
    config = read_json(directory / "config.json", directory)
    meaning = {key: value for key, value in config.items() if key not in VOLATILE}
    return TeacherIdentity(weights=_weights_digest(directory), config=sha256_json(meaning))


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
    """(the entries of a safetensors file's header, the offset of the tensors' bytes)."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {size:,} bytes")
            header: dict[str, Any] = json.loads(file.read(size))
        header.pop("__metadata__", None)
    except (ValueError, RecursionError, AttributeError) as error:
        raise TeacherError(f"{path} is not a safetensors file: {error}.\nFetch the model again.") from error
    return header, 8 + size


def weight_files(directory: Path) -> list[Path]:
    """The *.safetensors files of a teacher, sorted. Raises AssetError where it has none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise AssetError(
            f"there are no weights in {directory}: expected *.safetensors.\n"
            "Weights in other formats can contain code and are never opened: convert them (save_pretrained)."
        )
    return files


def check_no_own_code(directory: Path) -> None:
    """Raise TeacherError where a model needs code that comes with it: such code is never run.

    An architecture of transformers loads without it, even where the model's files name some.
    """
    from transformers import CONFIG_MAPPING

    config = read_json(directory / "config.json", directory)
    if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise TeacherError(
            f"the model in {directory} needs code of its own: its config.json names {config['auto_map']}.\n"
            "Code that comes with a model is never run, and transformers has no architecture "
            f"{config.get('model_type')!r}. Take a model of an architecture that it has."
        )


def read_json(path: Path, directory: Path) -> dict[str, Any]:
    """The content of a JSON file of a teacher. Raises AssetError where it is missing."""
    if not path.is_file():
        raise AssetError(
            f"{path} is missing: {directory} is not a teacher.\n"
            f"Make it with `dvc repro teacher@{directory.name}`, or correct the directory in params.yaml."
        )
    content: dict[str, Any] = json.loads(path.read_text())
    return content
