"""Input from strangers, with right checksums everywhere: refused by name, before memory is taken."""

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import Cache, compact, hidden, manifest, pages, records
from storage.checksums import file_entry
from storage.errors import CacheError, FormatTooNew, ManifestInvalid, ShardCorrupt, ShardUnexpected
from storage.fingerprints import canonical_json, sha256_json
from storage.manifest import MANIFEST_NAME
from tests.storage.conftest import LABELS, make_rows
from tests.storage.test_refusals import rewrite

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
ALLOWED = 64 * 2**20  # bytes beyond what the imports take

# Opens and reads caches with limited memory, and prints what happened.
READ = f"""
import resource, sys
import pyarrow as pa
from storage import Cache, StillroomError
from storage.verify import verify
from tests.storage.test_hostile import GOLDEN
pa.set_cpu_count(1); pa.set_io_thread_count(1)
verify(Cache.open(GOLDEN / "states-v4" / "small"))  # what is loaded at first use
taken = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + {ALLOWED}, taken + {ALLOWED}))
for path in sys.argv[1:]:
    try:
        verify(Cache.open(path))
    except StillroomError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""


def read_with_little_memory(*caches: Path) -> list[str]:
    """What a process with `ALLOWED` more bytes of memory prints about each cache."""
    command = [sys.executable, "-c", READ, *map(str, caches)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A copy of the golden cache of logits, to be forged."""
    shutil.copytree(GOLDEN / "cache-v1", tmp_path / "dense")
    return tmp_path / "dense"


def with_right_digests(cache: Path, **changes: Any) -> None:
    """Give the first shard's files their true digests in the manifest; `changes` are to its entry."""

    def change(body: dict[str, Any]) -> None:
        shard = body["shards"][0]
        shard["files"] = [file_entry(cache, file["path"]).model_dump() for file in shard["files"]]
        shard.update(changes)

    rewrite(cache, change)


def logits_of(cache: Path) -> Path:
    """The first shard's Parquet file."""
    return cache / Cache.open(cache).shards[0].logits_path


SOUND = json.loads((GOLDEN / "states-v4" / "small" / MANIFEST_NAME).read_bytes())
SOUND.pop("checksum")
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([2**64, -1, "../x", ""])
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """A path into nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, part in inner for found in places(part, (*place, key)))]


@given(st.sampled_from(places(SOUND)[1:]), JSON, st.booleans())
def test_any_value_anywhere_in_a_manifest_is_read_or_refused(
    place: tuple[Any, ...], value: Any, checksum: bool
) -> None:
    body = json.loads(json.dumps(SOUND))
    *way, last = place
    part = body
    for key in way:
        part = part[key]
    part[last] = value
    try:
        raw = manifest.checksummed(body) if checksum else json.dumps(body).encode()
    except ValueError:  # no canonical JSON: infinity, half a letter
        raw = json.dumps(body | {"checksum": "0" * 64}).encode()
    with contextlib.suppress(ManifestInvalid, FormatTooNew):  # and no other error
        assert manifest.render(manifest.parse(raw, Path("manifest.json"))) == raw


@pytest.mark.parametrize(
    "value",
    [b"1e999", b'"\\ud800"', b"[" * 800 + b"]" * 800, b"[" * 9000 + b"]" * 9000, b"9" * 5000, b"NaN"],
    ids=["infinite", "half a letter", "deep", "deeper", "huge", "no number"],
)
@pytest.mark.parametrize("place", ["provenance", "dataset"])
def test_json_that_python_cannot_write_again_is_refused(dense: Path, place: str, value: bytes) -> None:
    body = json.loads((dense / MANIFEST_NAME).read_bytes())
    body.pop("checksum")
    body[place] = "HERE" if place == "dataset" else {"x": "HERE"}
    unsealed = canonical_json(body).replace(b'"HERE"', value)
    try:
        checksum = sha256_json(json.loads(unsealed))
    except (ValueError, RecursionError):
        checksum = "0" * 64
    (dense / MANIFEST_NAME).write_bytes(b'{"checksum":"%s",' % checksum.encode() + unsealed[1:] + b"\n")
    with pytest.raises(ManifestInvalid, match=r"manifest\.json"):
        Cache.open(dense)


def test_a_key_that_stands_there_twice_is_refused(dense: Path) -> None:
    raw = (dense / MANIFEST_NAME).read_bytes()
    (dense / MANIFEST_NAME).write_bytes(raw.replace(b'{"checksum"', b'{"checksum":"0","checksum"'))
    with pytest.raises(ManifestInvalid, match="canonical"):
        Cache.open(dense)


def write_bomb(path: Path, groups: int) -> int:
    """Write a well-formed shard of row groups of equal rows; return its number of rows."""
    rows = make_rows(0, 1)
    many = records.ROW_GROUP_ROWS
    layout = records.schema(len(LABELS), LABELS)
    numbers = pa.array(np.zeros(many * len(LABELS), np.float32))
    group = pa.Table.from_arrays(
        [
            pa.array(rows.row_ids.to_pylist() * many),
            pa.array(rows.input_hashes.to_pylist() * many),
            pa.array(np.full(many, 2, np.int32)),
            pa.FixedSizeListArray.from_arrays(numbers, type=layout.field("logits").type),
        ],
        schema=layout,
    )
    with pq.ParquetWriter(
        path, layout, compression="zstd", use_dictionary=False, write_page_checksum=True
    ) as writer:
        for _ in range(groups):
            writer.write_table(group)
    return groups * many


def varint(number: int, length: int = 0) -> bytes:
    """A number as Thrift writes it, with zeros behind it up to this many bytes."""
    digits = [number & 127]
    while number := number >> 7:
        digits.append(number & 127)
    digits += [0] * (length - len(digits))
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def lying_page(path: Path, uncompressed: int) -> None:
    """Let the first page's header claim this many bytes, without a checksum; nothing moves in the file."""
    raw = path.read_bytes()
    start = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    cursor = pages._Compact(raw[start:])
    ends = [cursor.at]
    for _ in range(4):  # type, uncompressed, compressed, crc: a byte that names the field, and a number
        cursor.at += 1
        ends.append((cursor._integer(), cursor.at)[1])
    rest = cursor.at
    claim = varint(2 * uncompressed)
    free = rest - 5 - len(claim)
    compressed = pages._Compact(raw[start + ends[2] + 1 :])._integer()
    header = b"\x15\x00\x15" + claim + b"\x15" + varint(2 * compressed, free)
    assert raw[start + rest] == 0x1C, "the next field is the one behind the checksum"
    path.write_bytes(raw[:start] + header + b"\x2c" + raw[start + rest + 1 :])


def forge_json_of_holes(cache: Path) -> None:
    """A manifest of more than a gigabyte that takes no room."""
    with (cache / MANIFEST_NAME).open("wb") as file:
        file.truncate(manifest.MAX_MANIFEST_BYTES + 1)


def forge_json_of_lists(cache: Path) -> None:
    """A manifest of 15 MB that takes 500 MB when it is read."""
    raw = b'{"format":"stillroom-cache","x":[' + b"[]," * 5_000_000 + b"[]]}"
    (cache / MANIFEST_NAME).write_bytes(raw)


def forge_bomb(cache: Path) -> None:
    """A shard of some kilobytes that takes hundreds of megabytes when it is read."""
    path = logits_of(cache)
    rows = write_bomb(path, 128)
    assert path.stat().st_size < 2**18
    assert rows * 88 > 2 * ALLOWED
    with_right_digests(cache, rows=rows, positions=2 * rows)


def forge_page(cache: Path) -> None:
    """A page of which the header claims gigabytes."""
    lying_page(logits_of(cache), 2**31 - 1)
    with_right_digests(cache)


def forge_footer(cache: Path) -> None:
    """A footer that claims a schema of 900,000 elements."""
    footer = b"\x15\x02\x19\xfc" + varint(900_000) + bytes(1_000_000)
    logits_of(cache).write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with_right_digests(cache)


HUNGRY = {
    forge_footer: r"ShardCorrupt .* Exceeded size limit",
    forge_json_of_holes: r"ManifestInvalid .* bytes: more than a manifest may have",
    forge_json_of_lists: r"ManifestInvalid .* values in [0-9,]+ bytes are more than a manifest may have",
    forge_bomb: rf"ShardCorrupt .* bytes would take more than {pages.ALWAYS_FINE:,} in memory",
    forge_page: r"ShardCorrupt .* bytes would take more than [0-9,]+ in memory",
}


def test_what_would_fill_the_memory_is_refused_before_it_does(tmp_path: Path) -> None:
    caches = []
    for forge in HUNGRY:
        caches.append(tmp_path / str(len(caches)))
        shutil.copytree(GOLDEN / "cache-v1", caches[-1])
        forge(caches[-1])
    lines = read_with_little_memory(*caches)
    for line, expected in zip(lines, HUNGRY.values(), strict=True):
        assert re.match(expected, line), line
    with pytest.raises(ShardCorrupt, match="in memory"):
        Cache.open(caches[list(HUNGRY).index(forge_bomb)]).row_ids()


def test_rows_that_are_all_the_same_compress_well_and_are_read(dense: Path) -> None:
    path = logits_of(dense)
    write_bomb(path, 4)
    assert path.stat().st_size * pages.MOST_EXPANDED < 4 * records.ROW_GROUP_ROWS * 88
    assert len(records.read(path, len(LABELS)).row_ids) == 4 * records.ROW_GROUP_ROWS


FOOTERS = {
    "a schema of 2^30 elements": b"\x15\x02\x19\xfc" + varint(2**30),
    "a name of 2^31 bytes": b"\x15\x02\x19\x1c\x48" + varint(2**31 - 1),
    "lists in lists": b"\x15\x02\x19\x19" + b"\x19" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("name", FOOTERS)
@pytest.mark.parametrize("length", [None, 0, 2**31, 2**32 - 1])
def test_a_footer_that_claims_too_much_is_refused(dense: Path, name: str, length: int | None) -> None:
    footer = FOOTERS[name]
    size = len(footer) if length is None else length
    path = logits_of(dense)
    path.write_bytes(b"PAR1" + footer + size.to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ShardCorrupt, match="cannot be read as Parquet"):
        records.read(path, len(LABELS))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [10**12, 4]),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [10**12, 4]}}),
        ("codecs", [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}]),
        ("codecs", [{"name": "numcodecs.pickle", "configuration": {}}]),
        ("data_type", "float64"),
        ("fill_value", 0.0),
        ("storage_transformers", [{"name": "anything"}]),
        ("zarr_format", 2),
        ("attributes", ["x" * 2**17]),
    ],
)
def test_zarr_metadata_that_is_not_the_formats_is_refused_before_zarr_reads_it(
    dense: Path, key: str, value: object
) -> None:
    path = next(dense.glob("hidden/*/layer.2/zarr.json"))
    body = json.loads(path.read_bytes())
    path.write_text(json.dumps(body | {key: value}))
    shard = next(s for s in Cache.open(GOLDEN / "cache-v1").shards if s.key in path.parts)
    spec = Cache.open(GOLDEN / "cache-v1").identity.spec.hidden
    assert spec is not None
    with pytest.raises(ShardCorrupt, match=rf"layer\.2 cannot be read as Zarr: ({key} is|its zarr.json is)"):
        hidden.read(path.parents[1], "layer.2", shard.rows, spec)


def test_states_of_more_rows_than_the_file_has_bytes_are_refused(dense: Path) -> None:
    group = next(dense.glob("hidden/*"))
    spec = Cache.open(dense).identity.spec.hidden
    assert spec is not None
    described, _ = hidden._layout((2**40, 4), np.dtype(np.float16))
    (group / "layer.1" / "zarr.json").write_text(json.dumps(described))
    with pytest.raises(ShardCorrupt, match=r"c\.0\.0 has \d+ bytes, expected 8,\d{3},\d{3},\d{3},\d{3}"):
        hidden.read(group, "layer.1", 2**40, spec)


@pytest.mark.parametrize("file", ["zarr.json", "layer.1/zarr.json", "layer.1/c.0.0"])
def test_a_file_that_the_manifest_does_not_list_is_never_read(dense: Path, file: str) -> None:
    def forget(body: dict[str, Any]) -> None:
        shard = body["shards"][0]
        shard["files"] = [f for f in shard["files"] if not f["path"].endswith(f"{shard['key']}/{file}")]

    rewrite(dense, forget)
    with pytest.raises(ManifestInvalid, match=f"does not list its file hidden/.*/{file}"):
        Cache.open(dense)


def test_a_tokenizer_that_lies_elsewhere_is_refused(dense: Path) -> None:
    rewrite(dense, lambda body: body["tokenizer_files"][0].update(path="logits/tokenizer.json"))
    with pytest.raises(ManifestInvalid, match=r"a file that is not a tokenizer's: logits/tokenizer\.json"):
        Cache.open(dense)


def test_other_files_in_the_directory_of_a_tokenizer_are_refused(dense: Path) -> None:
    (dense / "tokenizer" / "tokenizer_config.json").write_text("{}")  # a reader would look for it
    with pytest.raises(ShardUnexpected, match=r"tokenizer_config\.json is not part of this cache"):
        _ = Cache.open(dense).tokenizer_dir


def test_ranks_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "sparse-v2" / "topk-compact", tmp_path / "sparse")

    def change(body: dict[str, Any]) -> None:
        body["ranks"][0] = 10**9
        body["identity"]["spec"]["codec"]["ranks"] = sha256_json(body["ranks"])

    rewrite(tmp_path / "sparse", change)
    with pytest.raises(ManifestInvalid, match="ranks have ids outside the vocabulary"):
        Cache.open(tmp_path / "sparse")


def test_a_rank_past_a_large_vocabulary_is_no_small_id_again() -> None:
    ranks = compact.Ranks(np.array([7], np.int64), 2**31 - 1)
    with pytest.raises(IndexError, match="a rank is outside"):
        ranks.id(np.array([2**32 + 5], np.int64))


def test_a_row_without_tokens_is_refused(dense: Path) -> None:
    cache = Cache.open(dense)
    shard = cache.shards[0]
    rows = cache.read(shard)
    assert isinstance(rows, records.LogitRows)
    lengths = np.array([shard.positions, *[0] * (shard.rows - 1)], np.int32)
    path = logits_of(dense)
    path.unlink()
    records.write(path, rows._replace(num_tokens=lengths), LABELS)
    with_right_digests(dense)
    with pytest.raises(ShardCorrupt, match=f"row {rows.row_ids[1]} has no tokens"):
        Cache.open(dense).read(Cache.open(dense).shards[0])


def test_damage_behind_right_digests_is_refused_or_read_and_never_another_error() -> None:
    chosen = random.Random(1)
    parquet = sorted(GOLDEN.rglob("logits/*.parquet"))
    for path in parquet:
        cache = Cache.open(path.parents[1])
        shard = next(s for s in cache.shards if s.key == path.stem)
        sound = path.read_bytes()
        with tempfile.TemporaryDirectory() as copy:
            damaged = Path(copy) / path.name
            for _ in range(40):
                raw = bytearray(sound)
                for _ in range(chosen.choice([1, 1, 4])):
                    raw[chosen.randrange(len(raw))] = chosen.randrange(256)
                damaged.write_bytes(raw)
                with contextlib.suppress(CacheError):
                    spec, codec = cache.identity.spec, cache.identity.spec.sparse
                    if codec is None:
                        rows = records.read(damaged, spec.num_outputs, spec.per_position, spec.column)
                        assert len(rows.logits) >= shard.rows
                    else:
                        records.read_sparse(damaged, codec, cache.ranks, spec.per_position)
