"""assets.NAME of params.yaml -> assets/NAME."""

from pipeline import assets, config
from stages import cli, paths


def main(name: str) -> None:
    """Fetch one asset."""
    assets.fetch(name, config.pick(config.load().assets, "assets", name), paths.ASSETS / name)


if __name__ == "__main__":
    cli.run(main)
