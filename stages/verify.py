"""caches/NAME -> verified/NAME.json: every byte, every row, and a replay of the teacher.

Runs depend on the record: nothing is trained from a cache that fails.
"""

from pipeline.capture.verify import verify_cache
from pipeline.config.load import load_params, pick_entry
from pipeline.runtime.files import write_json
from stages import cli, paths
from storage import Cache


def main(name: str) -> None:
    """Verify one cache."""
    entry = pick_entry(load_params().caches, "caches", name)
    cache = Cache.open(paths.CACHES / name)
    record = verify_cache(name, cache, entry, paths.DATA / entry.dataset, paths.TEACHERS / entry.teacher)
    write_json(record, paths.VERIFIED / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
