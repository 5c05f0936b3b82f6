"""Two caches -> caches/NAME, a mixture: they lie in it side by side, and a run reads them as one."""

import json

from pipeline import config, mixing
from stages import cli, paths


def main(name: str) -> None:
    """Mix two caches."""
    entry = config.pick(config.load().mixtures, "mixtures", name)
    record = mixing.make(name, entry, paths.CACHES, paths.VERIFIED)
    (paths.VERIFIED / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
