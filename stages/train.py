"""A run of params.yaml -> models/RUN: one student a seed, trained from the cache."""

from pipeline import config, runs
from stages import cli, paths


def main(name: str) -> None:
    """Train one run."""
    params = config.load()
    run = config.pick(params.every_run, "runs", name)
    student, recipe = params.students[run.student], params.recipes[run.recipe]
    where = paths.of_run(name, run, params.workers)
    record = runs.train(name, run, student, recipe, params.workers.seeds_at_once, where)
    runs.write_curve(record, paths.CURVES / f"{name}.csv")


if __name__ == "__main__":
    cli.run(main)
