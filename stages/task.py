"""A task of a multi-task run -> tasks/RUN/TASK.json: the digests of what it learns from."""

from pipeline.config.load import load_params, pick_entry
from pipeline.runtime.files import write_json
from pipeline.streaming.verified import pin_task_inputs
from stages import cli, paths


def main(name: str) -> None:
    """Record the digests of what one task learns from."""
    params = load_params()
    run = pick_entry(params.tasks, "tasks", name).run
    task = params.everything_trained[name]
    pinned = pin_task_inputs(name, task, params.recipes[task.recipe], paths.of_run(name, task))
    write_json(pinned, paths.TASKS / run / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
