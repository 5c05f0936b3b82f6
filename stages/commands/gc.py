"""`stillroom gc`: list finished shards that no cache uses; --yes removes them."""

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
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without this they are listed.")] = False,
    keep_hours: Annotated[
        float, typer.Option(help="Leave shards that were written in the last hours.")
    ] = 24.0,
) -> None:
    """List or remove finished shards of this machine that no sealed cache uses."""
    if PARAMS.is_file() and (shared := load_params().workers.store):
        print(f"{shared} is left alone: other projects may use its shards")
    store = Store(paths.STORE)
    if not store.root.is_dir():
        print(f"there is no store at {store.root}: nothing to remove")
        return
    with garbage.lock_exclusive(store):
        _check_finished_caches()
        found = garbage.unused(store, paths.CACHES, keep_hours * 3600)
        for item in found:
            what = f"{item.rows:,} rows" if item.rows else "a table"
            print(f"{item.path}  {what}  {item.bytes / 1e6:,.1f} MB")
        rows, size = sum(item.rows for item in found), sum(item.bytes for item in found)
        total = f"{len(found):,} unused: {rows:,} rows, {size:,} bytes that nothing else holds"
        if yes:
            garbage.remove(store, found)
        print(f"{total}; {'removed' if yes else 'remove them with --yes' if found else 'nothing to do'}")


def _check_finished_caches() -> None:
    """Raise ConfigError where a finished cache is not here: its shards would look unused."""
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
            "the shards that it needs are unknown.\n"
            f"Restore it (`dvc checkout {paths.CACHES}/{gone[0]}`), or finish it "
            f"(`dvc repro cache@{gone[0]}`)."
        )


if __name__ == "__main__":
    cli.run(main)
