"""Two caches -> caches/NAME, a mixture that a run reads as one cache."""

from pipeline.config.load import load_params, pick_entry
from pipeline.runtime.files import write_json
from pipeline.streaming.verified import make_mixture
from stages import cli, paths


def main(name: str) -> None:
    """Mix two caches."""
    entry = pick_entry(load_params().mixtures, "mixtures", name)
    record = make_mixture(name, entry, paths.CACHES, paths.VERIFIED)
    write_json(record, paths.VERIFIED / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
