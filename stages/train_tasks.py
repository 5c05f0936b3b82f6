"""A run of several tasks of params.yaml -> models/RUN: one student a seed, trained from the caches of all."""

from pipeline import config, runs, task_runs
from stages import cli, paths


def main(name: str) -> None:
    """Train one run of several tasks."""
    params = config.load()
    entry = config.pick(params.multitask, "multitask", name)
    tasks = {task: params.everything_trained[task] for task in entry.weights}
    parts = {
        task: runs.Part(
            params.recipes[run.recipe], paths.of_run(task, run, params.workers), entry.weights[task]
        )
        for task, run in tasks.items()
    }
    student = params.students[entry.student]
    record = task_runs.train(name, entry, student, parts, params.workers, paths.MODELS / name)
    runs.write_curve(record, paths.CURVES / f"{name}.csv")


if __name__ == "__main__":
    cli.run(main)
