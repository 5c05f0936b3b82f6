"""A prepared dataset and a model -> data/NAME: its rows, and views of its training rows."""

import json

from pipeline import augment, config
from pipeline.progress import log
from stages import cli, paths


def main(name: str) -> None:
    """Augment one dataset."""
    entry = config.pick(config.load().augmented, "augmented", name)
    summary = augment.augment(name, entry, paths.DATA / entry.dataset, paths.DATA / name)
    log(json.dumps(summary, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
