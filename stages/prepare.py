"""A raw dataset -> data/NAME: rows with ids, labels and splits."""

import json

from pipeline import config, data
from pipeline.progress import log
from stages import cli, paths


def main(name: str) -> None:
    """Prepare one dataset."""
    entry = config.pick(config.load().datasets, "datasets", name)
    log(json.dumps(data.prepare(name, entry, paths.DATA / name), ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
