"""Format 2 for ever: golden caches of each codec and layout stay readable, today's writer makes the same."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from storage import Cache
from storage.records import EntryRows
from storage.verify import verify
from tests.golden import make_sparse

GOLDEN = make_sparse.GOLDEN
NAMES = list(make_sparse.codecs())


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_sparse_cache_stays_readable(name: str) -> None:
    """What it holds, against the dense probabilities that it was made from."""
    cache = Cache.open(GOLDEN / name)
    verify(cache)
    assert cache.manifest.format_version == 2
    probs = torch.softmax(make_sparse.logits().double(), -1).numpy()
    codec, first = name.split("-")[0], 0
    for shard in cache.shards:
        rows = cache.read(shard)
        assert isinstance(rows, EntryRows)
        assert rows.num_positions.tolist() == [make_sparse.POSITIONS] * 2
        entries = rows.entries
        known = probs[first + entries.positions, entries.ids]
        exact = np.arange(len(entries.ids)) < np.repeat(
            entries.offsets[:-1] + entries.num_exact, entries.counts
        )
        assert np.sqrt(entries.weights[exact]) == pytest.approx(np.sqrt(known[exact]), abs=0.03)
        total = np.add.reduceat(entries.weights.astype(np.float64), entries.offsets[:-1])
        assert total + np.exp(entries.log_tail) == pytest.approx(1, abs=1e-5)
        assert exact.all() if codec == "topk" else not exact.all()
        first += len(entries.counts)


@pytest.mark.parametrize("name", NAMES)
def test_todays_writer_makes_the_golden_sparse_caches(name: str, made: Path) -> None:
    """Compact shards to the byte. Plain ones hold floating point results, which processors round in their own
    way: to the last bits.
    """
    for path in sorted(p for p in (GOLDEN / name).rglob("*.parquet")):
        own = made / name / path.relative_to(GOLDEN / name)
        assert own.is_file(), "the key of a shard changed: raise FORMAT_VERSION"
        if name.endswith("compact"):
            assert own.read_bytes() == path.read_bytes(), (
                f"{name}: if other bytes are meant, raise FORMAT_VERSION and docs/cache-format.md with them"
            )
        golden, today = pq.read_table(path), pq.read_table(own)
        assert golden.schema == today.schema
        for column in golden.column_names:
            before, now = golden[column].to_pylist(), today[column].to_pylist()
            if column in ("log_probs", "log_tail"):
                before, now = np.concatenate(before), np.concatenate(now)
                assert now == pytest.approx(before, abs=1e-5)
            else:
                assert now == before
    ranks = [json.loads((root / name / "manifest.json").read_text()).get("ranks") for root in (GOLDEN, made)]
    assert ranks[0] == ranks[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse")
    make_sparse.write(out)
    return out
