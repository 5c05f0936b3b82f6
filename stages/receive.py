"""A URL and the digest of a manifest -> caches/NAME, which stands for the cache that lies there."""

import json

from pipeline.config.load import load_params, pick_entry
from stages import cli, paths
from storage.received import receive


def main(name: str) -> None:
    """Receive one cache."""
    entry = pick_entry(load_params().received, "received", name)
    receive(paths.CACHES / name, entry.url, entry.manifest)
    paths.VERIFIED.mkdir(parents=True, exist_ok=True)
    record = {"cache": name, "manifest": entry.manifest, "url": entry.url}
    (paths.VERIFIED / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
