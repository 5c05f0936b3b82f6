"""A multi-task run -> models/RUN: a student for each seed, trained from several caches."""

from pipeline.config.load import load_params, pick_entry
from pipeline.training.job import TaskPart, write_curve
from pipeline.training.multitask_run import train_multitask
from stages import cli, paths


def main(name: str) -> None:
    """Train one multi-task run."""
    params = load_params()
    entry = pick_entry(params.multitask, "multitask", name)
    tasks = {task: params.everything_trained[task] for task in entry.weights}
    parts = {
        task: TaskPart(
            params.recipes[run.recipe], paths.of_run(task, run, params.workers), entry.weights[task]
        )
        for task, run in tasks.items()
    }
    student = params.students[entry.student]
    record = train_multitask(name, entry, student, parts, params.workers, paths.MODELS / name)
    write_curve(record, paths.CURVES / f"{name}.csv")


if __name__ == "__main__":
    cli.run(main)
