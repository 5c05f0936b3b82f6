"""models/RUN -> exported/RUN: ONNX in float32 and int8; results/export/RUN.json: accuracy, size, latency."""

from pipeline import config, export, runs
from stages import cli, paths


def main(name: str) -> None:
    """Export one run, or one of the tasks of a run."""
    params = config.load()
    run = config.pick(params.everything_trained, "runs", name)
    student = params.students[run.student]
    result = export.export(name, run, student, params.export, paths.of_run(name, run), paths.EXPORTED / name)
    runs.write_json(result, paths.EXPORT / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
