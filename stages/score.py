"""teachers/NAME -> results/eval/teacher-NAME.json: the teacher's row of the table."""

from pipeline.config.load import load_params, pick_entry
from pipeline.evaluation.teachers import evaluate_teacher
from pipeline.runtime.files import write_json
from stages import cli, paths


def main(name: str) -> None:
    """Evaluate one teacher."""
    entry = pick_entry(load_params().teachers, "teachers", name)
    result = evaluate_teacher(name, entry, paths.DATA / entry.dataset, paths.TEACHERS / name)
    write_json(result, paths.EVAL / f"teacher-{name}.json")


if __name__ == "__main__":
    cli.run(main)
