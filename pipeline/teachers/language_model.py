"""Language models as teachers: taken as they are, and scored on the test rows."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.config.caches import mask_spec
from pipeline.config.teachers import Teacher
from pipeline.data.rows import TEST, Rows
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.engines.inference import InferenceRequest
from pipeline.engines.language_head import LanguageHead, position_states
from pipeline.engines.language_model import probability_mass
from pipeline.engines.loading import convert_gguf, load_language_model
from pipeline.engines.masking import teacher_tokens
from pipeline.objectives.base import binned_error
from pipeline.objectives.language_model import LanguageModelScores
from pipeline.runtime import hardware
from pipeline.runtime.progress import log
from pipeline.teachers.extremes import extreme_rows
from pipeline.teachers.files import empty_directory, keep_model_files, link_model, save_tokenizer
from storage.errors import AssetError, TeacherError


def prepare_language_model(name: str, entry: Teacher, rows: Rows, out: Path) -> dict[str, Any]:
    """Put a language model into `out`: a directory of transformers, or a GGUF file; return its record."""
    if entry.train:
        raise TeacherError(f"teachers.{name}.train: language models are taken as they are; remove it.")
    source = Path(entry.model)
    gguf = _gguf_file(name, source)
    hardware.pin_threads(hardware.num_cores())
    empty_directory(out)
    if gguf is not None:
        convert_gguf(gguf, out)
        keep_model_files(out)
    else:
        save_tokenizer(source, out)
        link_model(source, out)
    reader = TextReader(out, entry.max_length, entry.too_long)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    mask = mask_spec(rows.task, None)
    teacher_inputs = teacher_tokens(rows.task, mask, tokens, rows.row_ids, reader.special)
    truth = tokens.ids if mask else np.roll(tokens.ids, -1)
    model = load_language_model(out, hardware.precision("auto"), rows.task_spec.auto_class)
    head = LanguageHead(model, min(reader.num_ids, model.config.get_text_config().vocab_size))
    request = InferenceRequest(teacher_inputs.tokens, rows.select(TEST), reader.pad_id)
    probability_mass(head, request._replace(rows=extreme_rows(tokens)), teacher_inputs.has_target)
    scores = score_language_model(head, request, teacher_inputs.has_target, truth)
    log(f"{name}: perplexity {np.exp(scores.loss):.1f} on the {TEST} rows")
    return {
        "task": rows.task,
        "labels": [],
        "vocab_size": head.vocab_size,
        "max_length": entry.max_length,
        "too_long": entry.too_long,
        "accuracy": {TEST: scores.accuracy},
        "reading": {TEST: scores._asdict()},
        "parameters": model.num_parameters(),
        "training": None,
    }


@torch.inference_mode()
def score_language_model(
    head: LanguageHead,
    request: InferenceRequest,
    has_target: npt.NDArray[np.bool_],
    truth: npt.NDArray[np.int32],
) -> LanguageModelScores:
    """Loss, accuracy and calibration over all positions of these rows that have a target.

    `has_target` and `truth` are of each token of all rows; `truth` is the right id at its position.
    """
    tokens = request.inputs
    assert isinstance(tokens, Tokens)
    total, seconds_scoring = 0.0, 0.0
    confidences: list[npt.NDArray[np.float32]] = []
    correct: list[npt.NDArray[np.bool_]] = []
    started = time.perf_counter()
    for batch in position_states(head, request, has_target):
        true = truth[tokens.offsets[request.rows[batch.owners]] + batch.places].astype(np.int64)
        start = 0
        for logits_PV in head.logits(batch.states):
            true_P = torch.from_numpy(true[start : start + len(logits_PV)]).to(logits_PV.device)
            log_probs_PV = logits_PV.float().log_softmax(-1)
            best = log_probs_PV.max(-1)
            began = time.perf_counter()
            total -= log_probs_PV.gather(1, true_P[:, None]).sum().item()
            confidences.append(best.values.exp().cpu().numpy())
            correct.append((best.indices == true_P).cpu().numpy())
            start += len(logits_PV)
            seconds_scoring += time.perf_counter() - began
    seconds = time.perf_counter() - started - seconds_scoring
    confidence, right = np.concatenate(confidences), np.concatenate(correct)
    return LanguageModelScores(
        loss=total / len(right),
        accuracy=float(right.mean()),
        ece=binned_error(confidence, right),
        agreement=None,
        kl_to_teacher=None,
        tokens_per_second=len(right) / seconds,
    )


def _gguf_file(name: str, source: Path) -> Path | None:
    """The GGUF file to convert; None where `source` is a directory of transformers.

    Raises AssetError where it is neither.
    """
    files = [source] if source.suffix == ".gguf" else sorted(source.glob("*.gguf"))
    has_config = (source / "config.json").is_file()
    if has_config and any(source.glob("*.safetensors")):
        return None  # GGUF files next to the weights are quantised copies of them
    if len(files) > 1 or not (files or has_config):
        raise AssetError(
            f"teachers.{name}.model: {source} holds neither a config.json nor one *.gguf "
            f"(found {len(files)} of these).\n"
            f"Name the directory of a model, or a file: {source}/NAME.gguf."
        )
    return files[0] if files else None
