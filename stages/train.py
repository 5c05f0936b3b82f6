"""A run of params.yaml -> models/RUN: one student a seed, trained from the cache.

`torchrun --nproc-per-node 2 -m stages.train RUN` trains it in two processes that share each batch.
"""

from pipeline import config, hardware, runs
from stages import cli, paths


def main(name: str) -> None:
    """Train one run."""
    params = config.load()
    run = config.pick(params.every_run, "runs", name)
    student, recipe = params.students[run.student], params.recipes[run.recipe]
    workers = params.workers
    record = runs.train(
        name, run, student, recipe, workers.seeds_at_once, paths.of_run(name, run, workers), workers.readers,
        workers.checkpoint_minutes,
    )  # fmt: skip
    if hardware.ranks()[0] == 0:
        runs.write_curve(record, paths.CURVES / f"{name}.csv")


if __name__ == "__main__":
    cli.run(main)
