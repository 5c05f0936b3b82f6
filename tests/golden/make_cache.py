"""Writes tests/golden/cache-v1: two shards, five rows, three classes, two layers. Run by `make golden`."""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from storage.seal import SealedParts, seal
from storage.writer import Store
from tests.storage.conftest import IDENTITY, fill

GOLDEN = Path(__file__).parent / "cache-v1"


def write(out: Path) -> None:
    """The golden cache, in `out`."""
    with tempfile.TemporaryDirectory() as store:
        shards = fill(Store(Path(store)), (3, 2))
        seal(out, SealedParts(IDENTITY, shards, {"tokenizer.json": b"{}\n"}, {"teacher": "golden"}))


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write(GOLDEN)
