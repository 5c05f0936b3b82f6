"""teachers/NAME -> results/eval/teacher-NAME.json: the teacher's own row of the table."""

from pipeline import config, evaluation, runs
from stages import cli, paths


def main(name: str) -> None:
    """Evaluate one teacher."""
    entry = config.pick(config.load().teachers, "teachers", name)
    result = evaluation.evaluate_teacher(name, entry, paths.DATA / entry.dataset, paths.TEACHERS / name)
    runs.write_json(result, paths.EVAL / f"teacher-{name}.json")


if __name__ == "__main__":
    cli.run(main)
