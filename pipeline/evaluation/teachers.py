"""The score stage: a teacher's row of the results table, measured as the students' rows are."""

from pathlib import Path
from typing import Any

from pipeline.config.tasks import TASKS
from pipeline.config.teachers import Teacher
from pipeline.data.inputs import Reader, read_inputs
from pipeline.data.rows import TEST, Rows, load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.engines.language_head import LanguageHead
from pipeline.engines.loading import load_classifier, load_language_model
from pipeline.evaluation.latency import latencies
from pipeline.evaluation.results import Metrics, results_row
from pipeline.evaluation.sampled_lines import Line, sampled_lines
from pipeline.objectives.language_model import LanguageModelScores
from pipeline.objectives.registry import objective_of
from pipeline.runtime import hardware
from pipeline.streaming.model_inputs import InputTensors, for_transformers
from pipeline.teachers.record import reading_spec, teacher_reader, teacher_record
from pipeline.teachers.scoring import TeacherRows, labelled_logits


def evaluate_teacher(name: str, entry: Teacher, dataset: Path, teacher: Path) -> dict[str, Any]:
    """The teacher's metrics on the test split, in the form of a run's of one seed."""
    rows, reader, record = load_rows(dataset).only(TEST), teacher_reader(teacher), teacher_record(teacher)
    hardware.pin_threads(hardware.num_cores())
    task = record["task"]
    about: dict[str, Any] = {"kind": "teacher", "name": f"teacher-{name}", "teacher": name}
    about |= {"dataset": entry.dataset, "task": task, "cache": None, "student": None, "recipe": None}
    about["seeds"] = [entry.train.seed] if entry.train else [0]
    if "reading" in record:  # the teacher stage scored it: running it again would be expensive
        if TASKS[task].predicts_next:
            assert isinstance(reader, TextReader)
            about["lines"] = _lines(teacher, record, rows, reader)
        metrics = dict(LanguageModelScores(**record["reading"][TEST]).metrics)
    else:
        metrics = _evaluate_rows(teacher, record, rows, reader)
    metrics |= {
        "parameters": float(record["parameters"]),
        "bytes": float(sum(file.stat().st_size for file in teacher.glob("*.safetensors"))),
        "train_seconds": record["training"]["seconds"] if record["training"] else None,
    }
    return results_row(about, len(rows.row_ids), [metrics])


def _evaluate_rows(teacher: Path, record: dict[str, Any], rows: Rows, reader: Reader) -> Metrics:
    """Quality and latency; the agreement is that of the teacher with itself."""
    inputs, objective = read_inputs(reader, rows, rows.tags is not None), objective_of(record["task"])
    reading, chosen = reading_spec(teacher), rows.select(TEST)
    model = load_classifier(teacher, task=record["task"], reading=reading, pad_token_id=reader.pad_id)
    teacher_rows = TeacherRows(rows, inputs, reader.pad_id)
    logits_NC, labels = labelled_logits(model, teacher_rows, record["labels"], chosen)
    model.cpu()  # latency is that of one thread of a CPU, for teachers as for students

    def call(tensors: InputTensors) -> object:
        return model(**for_transformers(tensors))

    return {
        **objective.quality(logits_NC, labels),
        **objective.agreement(logits_NC, logits_NC, labels),
        **latencies({"": call}, inputs, chosen, reader.pad_id)[""],
    }


def _lines(teacher: Path, record: dict[str, Any], rows: Rows, reader: TextReader) -> list[Line]:
    model = load_language_model(teacher, hardware.precision("auto"))
    return sampled_lines(LanguageHead(model, record["vocab_size"]).next_logits, rows, reader)
