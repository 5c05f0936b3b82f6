"""A model and a dataset -> teachers/NAME: fine-tuned or as it is, scored, ready to be asked."""

from pipeline import config, finetune
from stages import cli, paths
from stages.elsewhere import refuse_if_done_elsewhere


def main(name: str) -> None:
    """Make one teacher."""
    params = config.load()
    entry = config.pick(params.teachers, "teachers", name)
    caches = [cache for cache, made in params.caches.items() if made.teacher == name]
    refuse_if_done_elsewhere(f"teacher@{name}", *caches[:1])
    finetune.make_teacher(name, entry, paths.DATA / entry.dataset, paths.TEACHERS / name)


if __name__ == "__main__":
    cli.run(main)
