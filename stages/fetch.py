"""A package, hub id or local path -> assets/NAME."""

from pipeline.config.load import load_params, pick_entry
from pipeline.data.assets import fetch_asset
from stages import cli, paths


def main(name: str) -> None:
    """Fetch one asset."""
    fetch_asset(name, pick_entry(load_params().assets, "assets", name), paths.ASSETS / name)


if __name__ == "__main__":
    cli.run(main)
