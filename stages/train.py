"""A run of params.yaml -> models/RUN: a student for each seed, trained from the cache.

`torchrun --nproc-per-node 2 -m stages.train RUN` trains it in two processes, each with a part of every batch.
"""

from pipeline.config.load import load_params, pick_entry
from pipeline.runtime import hardware
from pipeline.training.job import write_curve
from pipeline.training.run import train_run
from stages import cli, paths


def main(name: str) -> None:
    """Train one run."""
    params = load_params()
    run = pick_entry(params.every_run, "runs", name)
    student, recipe = params.students[run.student], params.recipes[run.recipe]
    workers = params.workers
    record = train_run(name, run, student, recipe, paths.of_run(name, run, workers), workers)
    if hardware.ranks()[0] == 0:
        write_curve(record, paths.CURVES / f"{name}.csv")


if __name__ == "__main__":
    cli.run(main)
