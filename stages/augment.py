"""A prepared dataset and a model -> data/NAME: its rows and views of its training rows."""

import json

from pipeline.augment.views import augment_dataset
from pipeline.config.load import load_params, pick_entry
from pipeline.runtime.progress import log
from stages import cli, paths


def main(name: str) -> None:
    """Augment one dataset."""
    entry = pick_entry(load_params().augmented, "augmented", name)
    summary = augment_dataset(name, entry, paths.DATA / entry.dataset, paths.DATA / name)
    log(json.dumps(summary, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
