"""A task of params.yaml -> tasks/RUN/TASK.json: what it learns from, by digest. Its run depends on that."""

import json

from pipeline import config, task_inputs
from stages import cli, paths


def main(name: str) -> None:
    """Pin what one task learns from."""
    params = config.load()
    run = config.pick(params.tasks, "tasks", name).run
    task = params.everything_trained[name]
    pinned = task_inputs.pinned(name, task, params.recipes[task.recipe], paths.of_run(name, task))
    out = paths.TASKS / run / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(pinned, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
