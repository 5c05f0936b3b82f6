"""What others see: other tools read our shards, reading needs no torch, names of data never change."""

import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import Cache, errors, manifest, order, records
from storage.fingerprints import content_fingerprint, input_hash, row_id
from storage.spec import Mask, shard_key
from storage.verify import verify
from tests.golden import make_cache
from tests.golden import make_rows as make_rows_golden
from tests.storage.conftest import IDENTITY, LABELS, make_rows

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "cache-v1"

NO_TORCH = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "dask", "datasets", "accelerate", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
from storage import Cache
from storage.verify import verify
cache = Cache.open(sys.argv[1])
assert cache.read(cache.shards[0]).logits.shape[1] == len(cache.labels)
cache.hidden(cache.shards[0], "layer.1")
verify(cache)
assert "torch" not in sys.modules
print(cache.num_rows)
"""


def test_a_cache_is_opened_and_read_where_torch_is_not_installed() -> None:
    command = [sys.executable, "-c", NO_TORCH, str(GOLDEN)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "5\n", done.stderr


def test_pandas_and_datasets_read_the_logit_shards_directly(sealed: Path, tmp_path: Path) -> None:
    expected = pa.concat_arrays([make_rows(0, 5).row_ids, make_rows(5, 3).row_ids]).to_pylist()
    frame = pd.concat(pd.read_parquet(sealed / s.logits_path) for s in Cache.open(sealed).shards)
    assert frame.row_id.tolist() == expected
    assert np.stack(frame.logits)[3].tolist() == [3.0, 3.5, -3.0]
    files = [str(sealed / shard.logits_path) for shard in Cache.open(sealed).shards]
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path))["train"]
    assert list(loaded["row_id"]) == expected
    assert list(loaded[3]["logits"]) == [3.0, 3.5, -3.0]


def test_pages_carry_checksums_and_labels_travel_in_the_file(sealed: Path) -> None:
    path = sealed / Cache.open(sealed).shards[0].logits_path
    assert pq.read_schema(path).metadata[b"stillroom.labels"] == b'["bad","fair","good"]'
    raw = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(3)
    raw[column.data_page_offset + column.total_compressed_size - 2] ^= 1
    flipped = sealed.parent / "flipped.parquet"
    flipped.write_bytes(raw)
    with pytest.raises(errors.ShardCorrupt, match="cannot be read as Parquet"):
        records.read(flipped, len(LABELS))


def test_logits_survive_to_the_bit(tmp_path: Path) -> None:
    awkward = np.array([[-0.0, 1e-45, 3e38], [np.float32(1) / 3, -1e-38, 0.0]], np.float32)
    rows = make_rows(0, 2)._replace(logits=awkward)
    records.write(tmp_path / "x.parquet", rows, LABELS)
    assert records.read(tmp_path / "x.parquet", 3).logits.tobytes() == awkward.tobytes()


def test_the_golden_cache_of_format_1_stays_readable_for_ever() -> None:
    cache = Cache.open(GOLDEN)
    verify(cache)
    assert cache.manifest.format_version == 1
    assert cache.labels == ("bad", "fair", "good")
    assert [shard.rows for shard in cache.shards] == [3, 2]
    rows = cache.read(cache.shards[1])
    assert rows.row_ids.to_pylist() == [
        "b048d7667b72a724fefd88dfab6348f8",
        "75c13b7014edab0c004bc43657a282e7",
    ]
    assert rows.logits.tolist() == [[3.0, 3.5, -3.0], [4.0, 4.5, -4.0]]
    assert rows.num_tokens.tolist() == [2, 2]
    assert cache.hidden(cache.shards[1], "layer.2").tolist() == [[6.0] * 4, [8.0] * 4]


def test_todays_writer_makes_the_golden_cache_byte_for_byte(tmp_path: Path) -> None:
    make_cache.write(tmp_path / "cache-v1")
    for path in sorted(p for p in GOLDEN.rglob("*") if p.is_file()):
        made = tmp_path / "cache-v1" / path.relative_to(GOLDEN)
        assert made.is_file(), f"{made.name}: the layout changed; raise FORMAT_VERSION"
        assert made.read_bytes() == path.read_bytes(), (
            f"{path.name} has other bytes: if that is meant, raise FORMAT_VERSION and docs/cache-format.md, "
            "keep this golden cache readable, and add a new one with `make golden`"
        )


@pytest.mark.parametrize("name", make_rows_golden.SPECS)
def test_the_golden_caches_of_other_tasks_stay_readable_and_are_made_today(name: str, tmp_path: Path) -> None:
    cache = Cache.open(make_rows_golden.GOLDEN / name)
    verify(cache)
    assert cache.manifest.format_version == 4
    assert (cache.identity.tokenizer is None) == (name == "images")
    found = np.concatenate([cache.read(shard).logits for shard in cache.shards])
    assert found.tolist() == [[0, 0.5, 0], [1, 1.5, -1], [2, 2.5, -2]]
    make_rows_golden.write(tmp_path)
    for path in sorted(p for p in cache.path.rglob("*") if p.is_file()):
        own = tmp_path / name / path.relative_to(cache.path)
        assert own.is_file(), "the key of a shard changed: raise FORMAT_VERSION"
        assert own.read_bytes() == path.read_bytes(), f"{path.name}: if that is meant, raise FORMAT_VERSION"


def test_names_of_rows_inputs_and_shards_never_change() -> None:
    assert row_id("reviews", "a good film") == "e9f5f505657a2b0aeb214c0382ad45a4"
    assert input_hash([101, 2204, 102]) == "d9b776fc94a05f140de0900f054180bc"
    assert content_fingerprint(["b", "a", "a"]) == content_fingerprint(["a", "b"])
    assert (
        shard_key(IDENTITY, ["r"], ["i"])
        == "50b5e05bc985aa74650d02ac37125f3ff5327621da9d40314bf7cc6d961d4dd0"
    )


def test_the_order_of_training_rows_never_changes() -> None:
    assert order.ORDER_VERSION == 1
    assert order.permutation(8, 0, 1, 2).tolist() == [4, 6, 1, 7, 0, 5, 2, 3]
    made = [batch.tolist() for batch in order.batches([3, 1, 2, 5, 4, 6, 7], 2, 2, 0, 1)]
    assert made == [[2, 3], [4, 6], [1, 0], [5]]
    assert [window.tolist() for window in order.windows(5, 2, 0, 1)] == [[0, 4], [1, 2], [3]]


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(1, 20), st.integers(1, 5), st.integers(0, 3))
def test_batches_hold_each_row_exactly_once(lengths: list[int], rows: int, bucket: int, epoch: int) -> None:
    made = list(order.batches(lengths, rows, bucket, 0, epoch))
    assert sorted(int(row) for batch in made for row in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= rows for batch in made)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 5))
def test_windows_hold_each_shard_exactly_once(shards: int, width: int, seed: int) -> None:
    made = order.windows(shards, width, seed, 0)
    assert sorted(int(shard) for window in made for shard in window) == list(range(shards))


def test_the_page_of_the_format_says_what_the_code_does() -> None:
    page = (ROOT / "docs" / "cache-format.md").read_text()
    assert f"Format version: **{manifest.FORMAT_VERSION}**" in page
    for name in [manifest.MANIFEST_NAME, manifest.FORMAT, "c.0.0", "stillroom.labels"]:
        assert f"`{name}`" in page or f'"{name}"' in page, name
    for field in [*records.schema(2), *records.schema(2, tokens=True)]:
        assert f"`{field.name}`" in page
    for model in (
        manifest.Manifest,
        manifest.ShardEntry,
        manifest.FileEntry,
        manifest.WeightsEntry,
        type(IDENTITY),
        type(IDENTITY.spec),
        Mask,
    ):
        for field in model.model_fields:
            assert f"`{field}`" in page, f"{model.__name__}.{field} is not on the page"
    refusals = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.CacheError)}
    for error in refusals - {errors.CacheError}:
        assert f"`{error.__name__}`" in page
    known = {error.__name__ for error in vars(errors).values() if isinstance(error, type)}
    assert set(re.findall(r"`((?:Shard|Manifest|Spec|Format|No)[A-Z]\w+)`", page)) <= known
