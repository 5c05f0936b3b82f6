"""The evaluate and score stages: rows of the results table, for runs and teachers, measured in one way."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from pipeline.config.params import Run, RunInputs
from pipeline.config.students import Student
from pipeline.config.tasks import TASKS
from pipeline.config.teachers import Teacher
from pipeline.data.inputs import Reader, read_inputs, student_reader
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.engines.language_head import LanguageHead
from pipeline.engines.loading import load_classifier, load_language_model
from pipeline.evaluation.latency import latency
from pipeline.objectives.language_model import LanguageModelScores, TeacherReference, score_documents
from pipeline.objectives.registry import objective_of
from pipeline.runtime import hardware
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.model_inputs import InputTensors, call_model, for_transformers
from pipeline.streaming.rows import CachedRows
from pipeline.streaming.verified import open_inputs
from pipeline.students.llama import Llama
from pipeline.students.registry import load_student
from pipeline.teachers.record import reading_spec, teacher_reader, teacher_record
from pipeline.teachers.scoring import labelled_logits
from pipeline.training.job import run_record
from pipeline.training.workload import predict_all
from storage import Cache
from storage.mixture import Mixture


def over_seeds(values: Sequence[dict[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Each metric as {"mean", "std", "values"} over seeds; std is that of a sample, None for one seed."""
    merged = {}
    for name in values[0]:
        column = [value[name] for value in values]
        known = [v for v in column if v is not None]
        whole = len(known) == len(column)
        merged[name] = {
            "mean": float(np.mean(known)) if whole else None,
            "std": float(np.std(known, ddof=1)) if whole and len(known) > 1 else None,
            "values": column,
        }
    return merged


SAMPLING_TEMPERATURE, SAMPLED_FROM = (
    0.8,
    40,
)  # how lines are drawn: from the 40 likeliest tokens, a little sharpened


@torch.inference_mode()
def continue_prompts(
    next_logits: Callable[[torch.Tensor], torch.Tensor],
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    seed: int,
) -> list[list[int]]:
    """So many more tokens for each prompt, drawn in one way for every model; the same seed, the same draws.

    `next_logits` takes ids [1, L] and gives the logits [V] of what comes next. Nothing is kept between
    tokens: for a few short lines.
    """
    lines = [list(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        for line in lines:
            logits = next_logits(torch.tensor([line])).float().cpu()
            top = (logits / SAMPLING_TEMPERATURE).topk(min(SAMPLED_FROM, len(logits)))
            drawn = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            line.append(int(top.indices[drawn]))
    return [line[len(prompt) :] for line, prompt in zip(lines, prompts, strict=True)]


SPLIT = "test"
TOKENS = 4096  # a batch of documents
NUM_LINES, PROMPT_TOKENS, LINE_TOKENS = 3, 12, 24

Values = dict[str, float | None]
Line = dict[str, str]


def evaluate_run(name: str, run: Run, student: Student, paths: RunInputs) -> dict[str, Any]:
    """The run's metrics on the test split, each as {"mean", "std", "values"} over its seeds."""
    seeds = run_record(paths)["seeds"]
    cache, rows = open_inputs(paths)
    rows = rows.only(SPLIT)
    hardware.pin_threads(hardware.num_cores())
    reader = student_reader(student, rows, paths.out / "tokenizer")
    about: dict[str, Any] = {"task": cache.identity.spec.task, "cache": run.cache, "student": run.student}
    about |= {"recipe": run.recipe, "seeds": list(run.seeds)}
    if paths.task:
        about["run"] = paths.out.name
    taught_by = cache.manifest.provenance.get("teacher")
    if isinstance(cache, Mixture):
        about["caches"] = [member.name for member in cache.members]
        taught_by = None  # no single teacher's row is the one to compare with
    if isinstance(reader, TextReader) and TASKS[cache.identity.spec.task].predicts_next:
        values, about["lines"] = _read_documents(cache, rows, seeds, paths, reader)
    else:
        values = _answer(cache, rows, seeds, paths, reader)
    return _row("run", name, taught_by, run.dataset, about, len(rows.row_ids), values)


def _answer(cache: Cache, rows: Rows, seeds: list[Any], paths: RunInputs, reader: Reader) -> list[Values]:
    tokens, objective = read_inputs(reader, rows), objective_of(cache.identity.spec.task)
    cached = CachedRows(cache, rows, tokens, reader.pad_id, (SPLIT,))
    chosen = rows.select(SPLIT)
    values = []
    for seed in seeds:
        model, facts = _load(paths, seed)
        said, teacher, truth = (tensor.numpy() for tensor in predict_all(model, cached))
        answer = partial(call_model, model)
        values.append(
            {
                **objective.quality(said, truth),
                **objective.agreement(said, teacher, truth),
                **facts,
                "latency_ms_batch_1": latency(answer, tokens, chosen, reader.pad_id, 1),
                "latency_ms_batch_32": latency(answer, tokens, chosen, reader.pad_id, 32),
            }
        )
    return values


def _read_documents(
    cache: Cache, rows: Rows, seeds: list[Any], paths: RunInputs, reader: TextReader
) -> tuple[list[Values], list[Line]]:
    """(metrics of each seed, how the first one continues the beginnings of documents)."""
    cached = CachedDocuments(cache, rows, (SPLIT,), reader.max_length)
    teacher = TeacherReference(cache.identity.spec.sampled, cached.entropy())
    values: list[Values] = []
    lines: list[Line] = []
    for seed in seeds:
        loaded, facts = _load(paths, seed)
        model = cast(Llama, loaded)
        seen = score_documents(model, cached.in_order(TOKENS), teacher)
        values.append({**seen.metrics, **facts, "train_tokens_per_second": seed["targets_per_second"]})
        lines = lines or _lines(model.next_logits, rows, reader)
    return values, lines


def _load(paths: RunInputs, seed: dict[str, Any]) -> tuple[torch.nn.Module, Values]:
    """(the student of a seed, its size and what it cost)."""
    directory = paths.out / f"seed-{seed['seed']}"
    model = load_student(directory, paths.task)
    return model, {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "bytes": float((directory / "model.safetensors").stat().st_size),
        "train_seconds": seed["seconds"],
    }


def evaluate_teacher(name: str, entry: Teacher, dataset: Path, teacher: Path) -> dict[str, Any]:
    """The teacher's row of the results table."""
    rows, reader, record = load_rows(dataset).only(SPLIT), teacher_reader(teacher), teacher_record(teacher)
    hardware.pin_threads(hardware.num_cores())
    seeds = [entry.train.seed] if entry.train else [0]
    about: dict[str, Any] = {
        "task": record["task"],
        "cache": None,
        "student": None,
        "recipe": None,
        "seeds": seeds,
    }
    facts = {
        "parameters": float(record["parameters"]),
        "bytes": float(sum(file.stat().st_size for file in teacher.glob("*.safetensors"))),
        "train_seconds": record["training"]["seconds"] if record["training"] else None,
    }
    if "reading" in record:  # it was read when it was taken, and that is dear
        if TASKS[record["task"]].predicts_next:
            model = load_language_model(teacher, hardware.precision("auto"))
            head = LanguageHead(model, record["vocab_size"])
            assert isinstance(reader, TextReader)
            about["lines"] = _lines(head.next_logits, rows, reader)
        values = {**LanguageModelScores(**record["reading"][SPLIT]).metrics, **facts}
    else:
        values = {**_said_by(teacher, record, rows, reader), **facts}
    return _row("teacher", f"teacher-{name}", name, entry.dataset, about, len(rows.row_ids), [values])


def _said_by(teacher: Path, record: dict[str, Any], rows: Rows, reader: Reader) -> Values:
    tokens, objective = read_inputs(reader, rows, rows.tags is not None), objective_of(record["task"])
    how = reading_spec(teacher)
    model = load_classifier(teacher, task=record["task"], how=how, pad_token_id=reader.pad_id)
    chosen = rows.select(SPLIT)
    said, truth = labelled_logits(model, rows, tokens, chosen, reader.pad_id)
    if rows.label_names:
        said = said[:, [record["labels"].index(label) for label in rows.label_names]]
    model.cpu()  # latency is that of one thread of a CPU, for teachers as for students

    def answer(inputs: InputTensors) -> object:
        return model(**for_transformers(inputs))

    return {
        **objective.quality(said, truth),
        **objective.agreement(said, said, truth),
        "latency_ms_batch_1": latency(answer, tokens, chosen, reader.pad_id, 1),
        "latency_ms_batch_32": latency(answer, tokens, chosen, reader.pad_id, 32),
    }


def _lines(next_logits: Callable[[torch.Tensor], torch.Tensor], rows: Rows, reader: TextReader) -> list[Line]:
    """How a model goes on with the beginnings of the first documents: the same ones, and draws, for all."""
    first = reader.tokenizer.encode_batch_fast(rows.texts.slice(0, NUM_LINES).to_pylist())
    prompts = [encoding.ids[:PROMPT_TOKENS] for encoding in first]
    made = continue_prompts(next_logits, prompts, LINE_TOKENS, seed=0)
    decode = reader.tokenizer.decode
    return [{"begins": decode(p), "goes_on": decode(m)} for p, m in zip(prompts, made, strict=True)]


def _row(
    kind: str,
    name: str,
    teacher: str | None,
    dataset: str,
    names: dict[str, Any],
    num_rows: int,
    values: list[dict[str, float | None]],
) -> dict[str, Any]:
    about = {
        "kind": kind,
        "name": name,
        "teacher": teacher,
        "dataset": dataset,
        **names,
        "split": SPLIT,
        "rows": num_rows,
        "machine": hardware.machine(),
        "threads": 1,
    }
    return {**over_seeds(values), "about": about}
