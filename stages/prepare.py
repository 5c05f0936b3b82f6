"""A raw dataset -> data/NAME: rows with ids, labels and splits."""

import json

from pipeline.config.load import load_params, pick_entry
from pipeline.data.prepare import prepare_dataset
from pipeline.runtime.progress import log
from stages import cli, paths


def main(name: str) -> None:
    """Prepare one dataset."""
    entry = pick_entry(load_params().datasets, "datasets", name)
    log(json.dumps(prepare_dataset(name, entry, paths.DATA / name), ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
