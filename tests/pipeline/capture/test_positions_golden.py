"""Format 3 for ever: golden caches of both tasks stay readable, today's writer makes the same bytes."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import counter_rng
from storage import Cache
from storage.entries import ends
from storage.records import EntryRows, LogitRows
from storage.verify import verify
from tests.golden import make_positions

GOLDEN = make_positions.GOLDEN


def test_the_golden_cache_of_a_classifier_of_tokens_stays_readable() -> None:
    cache = Cache.open(GOLDEN / "tags")
    verify(cache)
    assert cache.manifest.format_version == 3
    logits, read, first = make_positions.logits(3), make_positions.tokens(), 0
    for shard in cache.shards:
        rows = cache.read(shard)
        assert isinstance(rows, LogitRows)
        assert rows.token_ids is not None
        last = first + len(rows.token_ids)
        assert rows.logits.tolist() == logits[first:last].tolist()
        assert rows.token_ids.tolist() == read.ids[first:last].tolist()
        first = last
    assert first == len(read.ids)


def test_masks_of_the_golden_cache_are_those_of_the_law() -> None:
    """From the manifest and the true ids alone, as docs/cache-format.md defines them."""
    cache = Cache.open(GOLDEN / "masked")
    verify(cache)
    assert cache.manifest.format_version == 3
    identity, place = cache.identity, 0
    special, mask = identity.tokenizer.special_tokens, identity.spec.mask
    assert mask is not None
    for shard in cache.shards:
        rows = cache.read(shard)
        assert isinstance(rows, EntryRows)
        assert rows.token_ids is not None
        held = np.split(rows.token_ids, ends(rows.num_tokens)[1:-1])
        has_target = np.split(rows.entries.counts > 0, ends(rows.num_tokens)[1:-1])
        for row, read, targets in zip(rows.row_ids.to_pylist(), held, has_target, strict=True):
            true = make_positions.tokens().row(place)
            numbers = {}
            for position, token in enumerate(true.tolist()):
                if token not in special.values():
                    counter = (int(row[:8], 16), int(row[8:16], 16), position, 2 << 24)
                    words = counter_rng.philox(tuple(np.array([n], np.uint64) for n in counter), mask.seed)  # type: ignore[arg-type]
                    high, low = (int(word[0]) for word in words[:2])
                    numbers[position] = ((high >> 5) * 2**26 + (low >> 6)) / 2**53
            number = min(len(numbers), max(1, round(mask.share * len(numbers))))
            chosen = sorted(numbers, key=lambda position: (numbers[position], position))[:number]
            expected = [special["mask_token"] if i in chosen else t for i, t in enumerate(true.tolist())]
            assert read.tolist() == expected
            assert np.flatnonzero(targets).tolist() == sorted(chosen)
            place += 1


@pytest.mark.parametrize("name", ["tags", "masked"])
def test_todays_writer_makes_the_golden_caches_byte_for_byte(name: str, tmp_path: Path) -> None:
    make_positions.write(tmp_path)
    for path in sorted(p for p in (GOLDEN / name).rglob("*") if p.is_file()):
        own = tmp_path / name / path.relative_to(GOLDEN / name)
        assert own.is_file(), "the key of a shard changed: raise FORMAT_VERSION"
        assert own.read_bytes() == path.read_bytes(), (
            f"{path.name}: if other bytes are meant, raise FORMAT_VERSION and docs/cache-format.md with them"
        )
