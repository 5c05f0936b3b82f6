"""A URL and the digest of a manifest -> caches/NAME, a reference to the cache at the URL."""

from pipeline.config.load import load_params, pick_entry
from pipeline.runtime.files import write_json
from stages import cli, paths
from storage.received import receive


def main(name: str) -> None:
    """Receive one cache."""
    entry = pick_entry(load_params().received, "received", name)
    receive(paths.CACHES / name, entry.url, entry.manifest)
    record = {"cache": name, "manifest": entry.manifest, "url": entry.url}
    write_json(record, paths.VERIFIED / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
