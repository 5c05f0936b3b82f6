"""`stillroom merge A B --into C`: merge caches of one teacher and spec into one."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.load import load_params
from pipeline.config.params import PARAMS
from stages import cli, paths
from storage import Cache
from storage.errors import ConfigError
from storage.merging import merge
from storage.shared_store import open_store


def main(
    caches: Annotated[
        list[Path], typer.Argument(help="Directories of sealed caches; the first one's rows come first.")
    ],
    into: Annotated[Path, typer.Option(help="The directory of the merged cache, such as caches/NAME.")],
) -> None:
    """Merge caches of one teacher and spec. Rows that are in several must be equal, and are kept once."""
    if len(caches) < 2:
        raise ConfigError(f"{caches[0]} alone cannot be merged: name two caches or more.")
    shared = load_params().workers.store if PARAMS.is_file() else None
    merged = merge([Cache.open(path) for path in caches], into, open_store(paths.STORE, shared))
    print(
        f"{into}: {merged.manifest.num_rows:,} rows in {len(merged.manifest.every_shard):,} shards; "
        f"{merged.dropped_rows:,} rows were in several, and are kept once"
    )


if __name__ == "__main__":
    cli.run(main)
