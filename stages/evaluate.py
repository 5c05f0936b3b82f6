"""models/RUN -> results/eval/RUN.json: quality, agreement, calibration, size, latency.

All on the test split. Each task of a multi-task run has a file of its own: results/eval/TASK.json.
"""

from pipeline.config.load import load_params, pick_entry
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.runtime.files import write_json
from stages import cli, paths


def main(name: str) -> None:
    """Evaluate one run, or one task of a multi-task run."""
    params = load_params()
    run = pick_entry(params.everything_trained, "runs", name)
    where = paths.of_run(name, run, params.workers)
    result = evaluate_run(name, run, params.students[run.student], where)
    write_json(result, paths.EVAL / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
