"""`stillroom gc`: what lies in the store and no cache names; with --yes it is removed."""

from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML

from pipeline.config.load import load_params
from pipeline.config.params import PARAMS
from stages import cli, paths
from storage import garbage
from storage.errors import ConfigError
from storage.writer import Store

LOCK = Path("dvc.lock")


def main(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it. Without this it is only shown.")] = False,
    keep_hours: Annotated[float, typer.Option(help="Leave what was made in the last hours.")] = 24.0,
) -> None:
    """Show or remove finished shards of this machine that no sealed cache names."""
    if PARAMS.is_file() and (shared := load_params().workers.store):
        print(f"{shared} is left alone: other projects may use what lies there")
    store = Store(paths.STORE)
    if not store.root.is_dir():
        print(f"there is no store at {store.root}: nothing to remove")
        return
    with garbage.lock_exclusive(store):
        _refuse_unknown()
        found = garbage.unused(store, paths.CACHES, keep_hours * 3600)
        for item in found:
            what = f"{item.rows:,} rows" if item.rows else "a table"
            print(f"{item.path}  {what}  {item.bytes / 1e6:,.1f} MB")
        rows, size = sum(item.rows for item in found), sum(item.bytes for item in found)
        total = f"{len(found):,} of no use: {rows:,} rows, {size:,} bytes that nothing else holds"
        if yes:
            garbage.remove(store, found)
        print(f"{total}; {'removed' if yes else 'remove them with --yes' if found else 'nothing to do'}")


def _refuse_unknown() -> None:
    """Raise ConfigError where a cache was finished once and is not here: its shards would seem of no use."""
    if not (LOCK.is_file() and PARAMS.is_file()):
        return
    finished = YAML(typ="safe", pure=True).load(LOCK.read_text()).get("stages", {})
    known = load_params().caches
    gone = [
        name
        for name in known
        if f"cache@{name}" in finished and not (paths.CACHES / name / "manifest.json").is_file()
    ]
    if gone:
        raise ConfigError(
            f"caches.{gone[0]} was finished once and is not in {paths.CACHES}/ ({len(gone)} such): "
            "nothing says which shards it needs.\n"
            f"Bring it back (`dvc checkout {paths.CACHES}/{gone[0]}`), or finish it "
            f"(`dvc repro cache@{gone[0]}`)."
        )


if __name__ == "__main__":
    cli.run(main)
