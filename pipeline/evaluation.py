"""The evaluate and score stages: rows of the results table, for runs and teachers, measured in one way."""

import json
from pathlib import Path
from typing import Any

import torch

from pipeline import config, hardware, metrics, students, teachers
from pipeline.batches import CachedRows
from pipeline.data import load_rows
from pipeline.runs import RECORD, open_inputs
from pipeline.seeds import answers
from pipeline.tagging import where_labelled
from pipeline.tokens import TextReader

SPLIT = "test"


def evaluate_run(
    name: str, run: config.Run, student: config.Student, paths: config.RunPaths
) -> dict[str, Any]:
    """The run's metrics on the test split, each as {"mean", "std", "values"} over its seeds."""
    cache, rows = open_inputs(paths)
    rows = rows.only(SPLIT)
    hardware.pin_threads(hardware.num_cores())
    reader = TextReader(paths.out / "tokenizer", student.max_length, "truncate")
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    cached = CachedRows(cache, rows, tokens, reader.pad_id, (SPLIT,))
    chosen = rows.select(SPLIT)
    values = []
    for seed in json.loads((paths.out / RECORD).read_text())["seeds"]:
        directory = paths.out / f"seed-{seed['seed']}"
        model = students.load(directory)
        logits, teacher, labels = (tensor.numpy() for tensor in answers(model, cached))
        values.append(
            {
                **metrics.quality(logits, labels),
                **metrics.against_teacher(logits, teacher, labels),
                "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
                "bytes": float((directory / "model.safetensors").stat().st_size),
                "latency_ms_batch_1": metrics.latency(model, tokens, chosen, reader.pad_id, 1),
                "latency_ms_batch_32": metrics.latency(model, tokens, chosen, reader.pad_id, 32),
                "train_seconds": seed["seconds"],
            }
        )
    names = {"cache": run.cache, "student": run.student, "recipe": run.recipe, "seeds": list(run.seeds)}
    taught_by = cache.manifest.provenance.get("teacher")
    return _row("run", name, taught_by, run.dataset, names, len(chosen), values)


def evaluate_teacher(name: str, entry: config.Teacher, dataset: Path, teacher: Path) -> dict[str, Any]:
    """The teacher's row of the results table."""
    rows, reader, record = load_rows(dataset).only(SPLIT), teachers.reader(teacher), teachers.record(teacher)
    names = {"cache": None, "student": None, "recipe": None, "seeds": [0]}
    size = float(sum(file.stat().st_size for file in teacher.glob("*.safetensors")))
    if "perplexity" in record:  # measured when it was taken: it needs no label
        told = {"perplexity": record["perplexity"][SPLIT], "parameters": float(record["parameters"])}
        values = {**told, "bytes": size, "accuracy": None}
        return _row("teacher", f"teacher-{name}", name, entry.dataset, names, len(rows.row_ids), [values])
    hardware.pin_threads(hardware.num_cores())
    model = teachers.load(teacher, task=record["task"], pad_token_id=reader.pad_id)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids, rows.tags is not None)
    chosen = rows.select(SPLIT)
    logits, labels = where_labelled(model, rows, tokens, chosen, reader.pad_id)
    logits = logits[:, [record["labels"].index(label) for label in rows.label_names]]
    model.cpu()  # latency is that of one thread of a CPU, for teachers as for students

    def answer(ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> object:
        return model(input_ids=ids_BL, attention_mask=mask_BL.long())

    values = {
        **metrics.quality(logits, labels),
        **metrics.against_teacher(logits, logits, labels),
        "parameters": float(record["parameters"]),
        "bytes": size,
        "latency_ms_batch_1": metrics.latency(answer, tokens, chosen, reader.pad_id, 1),
        "latency_ms_batch_32": metrics.latency(answer, tokens, chosen, reader.pad_id, 32),
        "train_seconds": record["training"]["seconds"] if record["training"] else None,
    }
    names["seeds"] = [entry.train.seed] if entry.train else [0]
    return _row("teacher", f"teacher-{name}", name, entry.dataset, names, len(chosen), [values])


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
    return {**metrics.over_seeds(values), "about": about}
