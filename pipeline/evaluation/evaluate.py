"""The evaluate stage: metrics of a run's students on the test split."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch

from pipeline.config.params import Run, RunInputs
from pipeline.config.students import Student
from pipeline.config.tasks import TASKS
from pipeline.data.inputs import Reader, read_inputs, student_reader
from pipeline.data.rows import TEST, Rows
from pipeline.data.tokenizer import TextReader
from pipeline.evaluation.latency import latencies
from pipeline.evaluation.results import Metrics, results_row
from pipeline.evaluation.sampled_lines import Line, sampled_lines
from pipeline.objectives.language_model import TeacherReference, score_documents
from pipeline.objectives.registry import objective_of
from pipeline.runtime import hardware
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.model_inputs import call_model
from pipeline.streaming.rows import CachedRows
from pipeline.streaming.verified import open_inputs
from pipeline.students.base import LanguageModelStudent
from pipeline.students.registry import load_student
from pipeline.training.job import run_record
from pipeline.training.rows_workload import predict_all
from storage import Cache
from storage.mixture import Mixture

BATCH_TOKENS = 4096  # of documents

Seeds = Sequence[dict[str, Any]]  # what a run's record has of each seed


def evaluate_run(name: str, run: Run, student: Student, paths: RunInputs) -> dict[str, Any]:
    """The run's metrics on the test split, each as {"mean", "std", "values"} over its seeds."""
    seeds = run_record(paths)["seeds"]
    cache, rows = open_inputs(paths)
    rows, task = rows.only(TEST), cache.identity.spec.task
    hardware.pin_threads(hardware.num_cores())
    reader = student_reader(student, rows, paths.out / "tokenizer")
    mixed = isinstance(cache, Mixture)  # no single teacher's row is the one to compare with
    teacher = None if mixed else cache.manifest.provenance.get("teacher")
    about: dict[str, Any] = {"kind": "run", "name": name, "teacher": teacher, "dataset": run.dataset}
    about |= {"task": task, "cache": run.cache, "student": run.student}
    about |= {"recipe": run.recipe, "seeds": list(run.seeds)}
    if paths.task:
        about["run"] = paths.out.name
    if isinstance(cache, Mixture):
        about["caches"] = [member.name for member in cache.members]
    if isinstance(reader, TextReader) and TASKS[task].predicts_next:
        metrics, about["lines"] = _evaluate_documents(cache, rows, seeds, paths, reader)
    else:
        metrics = _evaluate_rows(cache, rows, seeds, paths, reader)
    return results_row(about, len(rows.row_ids), metrics)


def _evaluate_rows(cache: Cache, rows: Rows, seeds: Seeds, paths: RunInputs, reader: Reader) -> list[Metrics]:
    """The metrics of each seed's student, which gives one output a row."""
    inputs, objective = read_inputs(reader, rows), objective_of(cache.identity.spec.task)
    cached = CachedRows(cache, rows, inputs, reader.pad_id, (TEST,))
    chosen, found = rows.select(TEST), list[Metrics]()
    for seed in seeds:
        model, facts = _load(paths, seed)
        student, teacher, labels = (tensor.numpy() for tensor in predict_all(model, cached))
        milliseconds = latencies({"": partial(call_model, model)}, inputs, chosen, reader.pad_id)[""]
        quality, agreement = objective.quality(student, labels), objective.agreement(student, teacher, labels)
        found.append({**quality, **agreement, **facts, **milliseconds})
    return found


def _evaluate_documents(
    cache: Cache, rows: Rows, seeds: Seeds, paths: RunInputs, reader: TextReader
) -> tuple[list[Metrics], list[Line]]:
    """(the metrics of each seed's language model, lines that the first one generates)."""
    cached = CachedDocuments(cache, rows, (TEST,), reader.max_length)
    teacher = TeacherReference(cache.identity.spec.sampled, cached.entropy())
    found, lines = list[Metrics](), list[Line]()
    for seed in seeds:
        loaded, facts = _load(paths, seed)
        model = cast(LanguageModelStudent, loaded)
        scores = score_documents(model, cached.in_order(BATCH_TOKENS), teacher)
        found.append({**scores.metrics, **facts, "train_tokens_per_second": seed["targets_per_second"]})
        lines = lines or sampled_lines(model.next_logits, rows, reader)
    return found, lines


def _load(paths: RunInputs, seed: dict[str, Any]) -> tuple[torch.nn.Module, Metrics]:
    """(the student of a seed; its size and what its training took)."""
    directory = paths.out / f"seed-{seed['seed']}"
    model = load_student(directory, paths.task)
    return model, {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "bytes": float((directory / "model.safetensors").stat().st_size),
        "train_seconds": seed["seconds"],
    }
