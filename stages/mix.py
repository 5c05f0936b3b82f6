"""Two caches -> caches/NAME, a mixture: they lie in it side by side, and a run reads them as one."""

import json

from pipeline.config.load import load_params, pick_entry
from pipeline.streaming.verified import make_mixture
from stages import cli, paths


def main(name: str) -> None:
    """Mix two caches."""
    entry = pick_entry(load_params().mixtures, "mixtures", name)
    record = make_mixture(name, entry, paths.CACHES, paths.VERIFIED)
    (paths.VERIFIED / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
