"""models/RUN -> exported/RUN: ONNX in float32 and int8, compared with the student.

results/export/RUN.json has accuracy, size and latency of each."""

from pipeline.config.load import load_params, pick_entry
from pipeline.export.export_run import export_run
from pipeline.runtime.files import write_json
from stages import cli, paths


def main(name: str) -> None:
    """Export one run, or one task of a multi-task run."""
    params = load_params()
    run = pick_entry(params.everything_trained, "runs", name)
    student = params.students[run.student]
    result = export_run(name, run, student, params.export, paths.of_run(name, run), paths.EXPORTED / name)
    write_json(result, paths.EXPORT / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
