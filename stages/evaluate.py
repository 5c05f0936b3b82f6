"""models/RUN -> results/eval/RUN.json: quality, agreement, calibration, size, latency on the test split."""

from pipeline import config, evaluation, runs
from stages import cli, paths


def main(name: str) -> None:
    """Evaluate one run."""
    params = config.load()
    run = config.pick(params.every_run, "runs", name)
    where = paths.of_run(name, run, params.workers)
    result = evaluation.evaluate_run(name, run, params.students[run.student], where)
    runs.write_json(result, paths.EVAL / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
