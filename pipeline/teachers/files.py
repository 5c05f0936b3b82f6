"""The files of a teacher's directory: the tokenizer in one form, the weights linked to the model's own."""

import shutil
from pathlib import Path

from pipeline.data.tokenizer import TOKENIZER_FILES
from pipeline.engines.loading import OFFLINE
from storage.disk import link
from storage.errors import TeacherError


def empty_directory(out: Path) -> None:
    """Make `out` an empty directory. Its files may be links to the model's: they are removed, not written."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)


def save_tokenizer(source: Path, out: Path) -> None:
    """Save the tokenizer of `source` in `out`. Raises TeacherError where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(source, **OFFLINE).save_pretrained(out)
    except (OSError, ValueError) as error:
        raise TeacherError(f"the tokenizer in {source} cannot be loaded: {error}") from error
    keep_model_files(out)


def link_model(source: Path, out: Path) -> None:
    """Put the config and the weights of `source` into `out`, without a second copy of their bytes."""
    for file in [source / "config.json", *sorted(source.glob("*.safetensors*"))]:
        link(file.resolve(), out / file.name)


def keep_model_files(out: Path) -> None:
    """Remove what is neither tokenizer nor config nor weights."""
    for extra in out.iterdir():
        if extra.name not in (*TOKENIZER_FILES, "config.json") and ".safetensors" not in extra.name:
            extra.unlink()
