"""Targets that belong to tokens: logits of each, to the bit; shards and specs that cannot be are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from storage import Cache, records
from storage.codecs import TopK
from storage.errors import ManifestInvalid, ShardCorrupt
from storage.fingerprints import input_hash, row_id
from storage.records import LogitRows
from storage.seal import SealedParts, seal
from storage.spec import Identity, Mask, Spec
from storage.verify import verify
from storage.writer import Store
from tests.storage.conftest import IDENTITY, LABELS
from tests.storage.test_refusals import rewrite

LENGTHS = np.array([4, 1, 6, 3], np.int32)
FIRST = np.concatenate([[0], np.cumsum(LENGTHS)])


def spec(**changes: Any) -> Spec:
    """The spec of a classifier of tokens, with these changes."""
    body = {**IDENTITY.spec.model_dump(), "task": "token-classification", "hidden": None}
    return Spec.model_validate(body | changes)


WHO = Identity(**{**dict(IDENTITY), "spec": spec()})


def make_rows() -> LogitRows:
    """Four rows of different lengths; token t of all has the logits (t, t / 2, -t)."""
    ids = np.arange(100, 100 + LENGTHS.sum(), dtype=np.int32)
    numbers = np.arange(len(ids), dtype=np.float32)[:, None]
    return LogitRows(
        pa.array([row_id("toy", str(i)) for i in range(4)]),
        pa.array([input_hash(part) for part in np.split(ids, FIRST[1:-1])]),
        LENGTHS,
        numbers * np.array([[1, 0.5, -1]], np.float32),
        ids,
    )


def sealed(root: Path, rows: LogitRows) -> Cache:
    """A cache of one shard with these rows."""
    seal(root / "toy", SealedParts(WHO, [Store(root / "store").put(WHO, rows, {}, 1.0)], {}, {}))
    return Cache.open(root / "toy")


@pytest.mark.parametrize(("group", "num"), [(1, 4), (21, 2), (1000, 1)])
def test_logits_of_every_token_come_back_to_the_bit(
    tmp_path: Path, group: int, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ROW_GROUP_POSITIONS", group)
    rows = make_rows()
    rows.logits[5] = [-0.0, 1e-45, 3e38]
    cache = sealed(tmp_path, rows)
    verify(cache)
    path = cache.path / cache.shards[0].logits_path
    assert pq.read_metadata(path).num_row_groups == num
    found = cache.read(cache.shards[0])
    assert isinstance(found, LogitRows)
    assert found.logits.tobytes() == rows.logits.tobytes()
    assert found.token_ids is not None
    assert found.token_ids.tolist() == list(range(100, 114))
    assert found.num_tokens.tolist() == LENGTHS.tolist()
    assert found.owners.tolist() == [0] * 4 + [1] + [2] * 6 + [3] * 3
    some = found.take(np.array([3, 1]))
    assert some.token_ids is not None
    assert some.token_ids.tolist() == [111, 112, 113, 104]
    assert some.logits[:, 0].tolist() == [11, 12, 13, 4]


def test_other_tools_read_the_tokens_and_their_logits(tmp_path: Path) -> None:
    cache = sealed(tmp_path, make_rows())
    path = cache.path / cache.shards[0].logits_path
    row = pd.read_parquet(path).iloc[3]
    assert row.token_ids.tolist() == [111, 112, 113]
    assert np.stack(row.logits).tolist() == [[n, n / 2, -n] for n in (11, 12, 13)]
    group = pq.read_metadata(path).row_group(0)
    for column in range(3, group.num_columns):
        assert "BYTE_STREAM_SPLIT" in group.column(column).encodings


@pytest.mark.parametrize("column", ["token_ids", "logits"])
def test_a_row_of_another_number_of_tokens_than_it_says_is_refused(tmp_path: Path, column: str) -> None:
    records.write(tmp_path / "x.parquet", make_rows(), LABELS)
    table = pq.read_table(tmp_path / "x.parquet")
    place, values = table.schema.get_field_index(column), table.column(column).to_pylist()
    values[0], values[1] = values[0][:-1], [*values[1], values[0][-1]]
    pq.write_table(
        table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type)),
        tmp_path / "x.parquet",
        use_dictionary=False,
    )
    with pytest.raises(ShardCorrupt, match=f"another number of {column} than num_tokens"):
        records.read(tmp_path / "x.parquet", 3, tokens=True)


def test_a_shard_of_one_target_a_row_is_none_of_one_a_token(tmp_path: Path) -> None:
    rows = make_rows()
    records.write(tmp_path / "x.parquet", rows._replace(logits=rows.logits[:4], token_ids=None), LABELS)
    with pytest.raises(ShardCorrupt, match="another layout"):
        records.read(tmp_path / "x.parquet", 3, tokens=True)


def test_a_logit_that_is_no_number_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = make_rows()
    rows.logits[9, 1] = np.nan
    cache = sealed(tmp_path, rows)
    with pytest.raises(ShardCorrupt, match=row_id("toy", "2")):
        cache.read(cache.shards[0])


def test_token_ids_that_their_hash_was_not_made_of_are_refused_with_their_row(tmp_path: Path) -> None:
    rows = make_rows()
    assert rows.token_ids is not None
    rows.token_ids[4] += 1
    with pytest.raises(ShardCorrupt, match=f"row {row_id('toy', '1')} has other token ids"):
        verify(sealed(tmp_path, rows))


def test_a_cache_of_tokens_is_of_format_3_and_says_so(tmp_path: Path) -> None:
    cache = sealed(tmp_path, make_rows())
    assert cache.manifest.format_version == 3
    rewrite(cache.path, lambda body: body.update(format_version=1))
    with pytest.raises(ManifestInvalid, match="format_version is 1"):
        Cache.open(cache.path)


MASK = Mask(share=0.15, seed=0).model_dump()
CODEC = TopK(k=5, layout="plain").model_dump()
LANGUAGE = {"labels": [], "vocab_size": 50, "codec": CODEC}


def test_specs_that_can_be_are_accepted_and_hold_what_applies_alone() -> None:
    assert "mask" not in spec().model_dump()
    masked = spec(task="masked-lm", mask=MASK, **LANGUAGE)
    assert masked.model_dump()["mask"] == {"share": 0.15, "seed": 0}
    assert "mask" not in spec(task="causal-lm", **LANGUAGE).model_dump()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": CODEC}, "codec dense"),
        ({"hidden": IDENTITY.spec.hidden}, "hidden states are one a token"),
        ({"labels": ["one"]}, "has labels, at least 2"),
        ({"mask": MASK}, "has no field mask"),
        ({"task": "causal-lm", **LANGUAGE, "mask": MASK}, "has no field mask"),
        ({"task": "masked-lm", **LANGUAGE}, "masked-lm needs a field mask"),
        ({"task": "masked-lm", **LANGUAGE, "mask": MASK, "codec": "dense"}, "a sparse codec"),
        ({"task": "masked-lm", **LANGUAGE, "mask": {"share": 0.0, "seed": 0}}, "greater than 0"),
        ({"task": "masked-lm", **LANGUAGE, "mask": {"share": 1.1, "seed": 0}}, "less than or equal to 1"),
        ({"task": "masked-lm", **LANGUAGE, "mask": {"share": 0.1, "seed": -1}}, "greater than or equal to 0"),
    ],
)
def test_specs_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec(**changes)
