"""A model and a dataset -> teachers/NAME: fine-tuned or as it is, and scored."""

from pipeline.config.load import load_params, pick_entry
from pipeline.teachers.prepare import prepare_teacher
from stages import cli, paths
from stages.teacher_guard import check_not_done_elsewhere


def main(name: str) -> None:
    """Prepare one teacher."""
    params = load_params()
    entry = pick_entry(params.teachers, "teachers", name)
    caches = [cache for cache, made in params.caches.items() if made.teacher == name]
    check_not_done_elsewhere(f"teacher@{name}", *caches[:1])
    prepare_teacher(name, entry, paths.DATA / entry.dataset, paths.TEACHERS / name)


if __name__ == "__main__":
    cli.run(main)
