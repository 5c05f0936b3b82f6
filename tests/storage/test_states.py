"""Hidden states of tokens, in int8, as principal components: what comes back, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydantic import ValidationError

from storage import Cache, hidden
from storage.checksums import file_entry
from storage.errors import ManifestInvalid, ShardCorrupt, ShardMissing
from storage.spec import HiddenSpec
from storage.verify import verify
from tests.golden import make_states
from tests.golden.make_states import BASES, GOLDEN, SHARDS, SMALL, states
from tests.storage.conftest import HIDDEN
from tests.storage.test_refusals import read_all, rewrite

STEP = 0.5 / 127


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of the golden cache in int8, to be damaged."""
    shutil.copytree(GOLDEN / "small", tmp_path / "small")
    return tmp_path / "small"


def test_states_of_tokens_come_back_row_after_row() -> None:
    cache = Cache.open(GOLDEN / "plain")
    assert verify(cache).positions == 8
    assert cache.manifest.format_version == 4
    assert cache.hidden_names == ("layer.0", "layer.2")
    assert cache.hidden_per_position
    for shard, rows in zip(cache.shards, SHARDS, strict=True):
        for name in cache.hidden_names:
            assert cache.hidden(shard, name).tolist() == states(name, rows).tolist()


def test_components_and_queries_keys_and_values_come_back_from_int8() -> None:
    cache = Cache.open(GOLDEN / "small")
    verify(cache)
    assert cache.manifest.format_version == 4
    assert cache.hidden_names == ("layer.1", "qkv.2")
    basis = cache.hidden_basis("layer.1")
    for part, expected in zip(basis, BASES["layer.1"], strict=True):
        assert np.array_equal(part, expected)
    for shard, rows in zip(cache.shards, SHARDS, strict=True):
        whole = states("layer.1", rows)
        components = whole[:, [2, 0]] - [3, 1]  # by hand: the axes are the third and the first number
        for name, exact in (("layer.1", components), ("qkv.2", states("qkv.2", rows))):
            found = cache.hidden(shard, name)
            assert found.dtype == np.float32
            assert (np.abs(found - exact).max(1) <= STEP * 1.000001 * np.abs(exact).max(1)).all()
        back = basis.mean + cache.hidden(shard, "layer.1") @ basis.axes
        assert back[:, [0, 2]] == pytest.approx(whole[:, [0, 2]], abs=0.1)
        assert back[:, [1, 3]].tolist() == [[2, 4]] * len(back), "what the axes leave out is the mean"
    with pytest.raises(ValueError, match=r"does not have qkv\.2 as principal components"):
        cache.hidden_basis("qkv.2")


@pytest.mark.parametrize("name", ["plain", "small"])
def test_todays_writer_makes_the_golden_caches_byte_for_byte(name: str, tmp_path: Path) -> None:
    make_states.write(tmp_path)
    for path in sorted(p for p in (GOLDEN / name).rglob("*") if p.is_file()):
        own = tmp_path / name / path.relative_to(GOLDEN / name)
        assert own.is_file(), "the key of a shard changed: raise FORMAT_VERSION"
        assert own.read_bytes() == path.read_bytes(), (
            f"{path.name}: if other bytes are meant, raise FORMAT_VERSION and docs/cache-format.md with them"
        )


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=NUMBERS)


@given(VECTORS)
def test_int8_is_at_most_half_a_scale_away(values: np.ndarray) -> None:
    codes, scale = hidden.encode(values)
    assert codes.dtype == np.int8
    assert codes.min(initial=0) > hidden.MISSING
    assert (scale > 0).all()
    error = np.abs(codes * scale.astype(np.float64)[:, None] - values)
    assert (error <= scale[:, None] * (0.5 + 1e-4)).all()  # the scale itself is rounded to float32


def test_a_vector_of_zeros_stays_one() -> None:
    codes, scale = hidden.encode(np.zeros((2, 3), np.float32))
    assert not codes.any()
    assert np.isfinite(scale).all()


def test_old_pooled_states_are_described_as_before() -> None:
    assert set(HIDDEN.model_dump()) == {"layers", "pool", "width", "dtype"}
    assert set(SMALL.model_dump()) == {"layers", "pool", "width", "dtype", "qkv", "pca", "basis"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "neither layers nor qkv"),
        ({"qkv": (1,)}, "pool is none"),
        ({"qkv": (0,), "pool": "none"}, "greater than or equal to 1"),
        ({"pca": 5}, "at most their width 4"),
        ({"layers": (), "qkv": (1,), "pool": "none", "pca": 2}, "pca needs layers"),
        ({"basis": "0" * 64}, "a basis needs pca"),
        ({"dtype": "int4"}, "'float16', 'float32' or 'int8'"),
    ],
)
def test_states_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HiddenSpec.model_validate({**HIDDEN.model_dump(), **changes})


@pytest.mark.parametrize("part", ["hidden-basis/layer.1.mean/c.0", "hidden/*/qkv.2.scale/zarr.json"])
def test_a_missing_file_is_named(small: Path, part: str) -> None:
    path = next(small.glob(part))
    path.unlink()
    with pytest.raises(ShardMissing, match=path.relative_to(small).as_posix()):
        Cache.open(small)


@pytest.mark.parametrize("name", ["layer.1", "layer.1.scale"])
def test_missing_numbers_are_never_read_as_zeros(small: Path, name: str) -> None:
    shard = Cache.open(small).shards[0]
    array = zarr.open_array(small / shard.hidden_path / name, mode="r+")
    values = np.array(array[:])
    values.flat[0] = array.fill_value
    array[:] = values
    with pytest.raises(ShardCorrupt, match="vectors without a scale, or numbers that are missing"):
        hidden.read(small / shard.hidden_path, "layer.1", shard.positions, SMALL)
    next((small / shard.hidden_path / name).glob("c.*")).unlink()
    with pytest.raises(ShardCorrupt, match="cannot be read as Zarr"):
        hidden.read(small / shard.hidden_path, "layer.1", shard.positions, SMALL)


def forge(path: Path, change: Callable[[Path], None]) -> None:
    """Change files as a forger would, with the right digests everywhere."""
    change(path)
    body = json.loads((path / "manifest.json").read_bytes())
    basis = body.get("hidden_basis", [])
    entries = [*basis, *(file for shard in body["shards"] for file in shard["files"])]
    found = {e["path"]: file_entry(path, e["path"]).model_dump() for e in entries}

    def digests(body: dict[str, Any]) -> None:
        if basis:
            body["hidden_basis"] = [found[file["path"]] for file in basis]
        for shard in body["shards"]:
            shard["files"] = [found[file["path"]] for file in shard["files"]]

    rewrite(path, digests)


def test_another_basis_is_refused_although_its_digest_is_right(small: Path) -> None:
    def exchange(path: Path) -> None:
        other = {"layer.1": BASES["layer.1"]._replace(mean=np.zeros(4, np.float32))}
        shutil.rmtree(path / "hidden-basis")
        hidden.write_bases(path / "hidden-basis", other)

    forge(small, exchange)
    with pytest.raises(ShardCorrupt, match="not the basis of these components"):
        read_all(small)


def test_a_state_that_is_no_number_is_refused_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    shutil.copytree(GOLDEN / "plain", path)
    shard = Cache.open(path).shards[0]

    def poison(path: Path) -> None:
        array = zarr.open_array(path / shard.hidden_path / "layer.2", mode="r+")
        states = np.array(array[:])
        states[3, 1] = np.nan  # the only token of the second row
        array[:] = states

    forge(path, poison)
    row = Cache.open(path).read(shard).row_ids[1].as_py()
    with pytest.raises(ShardCorrupt, match=rf"row {row} \(layer\.2\) is not finite"):
        read_all(path)


@pytest.mark.parametrize(
    "other",
    [SMALL.model_copy(update={"pca": 3}), SMALL.model_copy(update={"dtype": "float16"})],
    ids=["shape", "dtype"],
)
def test_arrays_of_another_shape_or_dtype_are_refused(small: Path, other: HiddenSpec) -> None:
    def exchange(path: Path) -> None:
        for shard in Cache.open(path).shards:
            group = path / shard.hidden_path
            shutil.rmtree(group)
            vectors = {n: np.ones((shard.positions, other.kept_width(n)), np.float32) for n in other.names}
            hidden.write(group, vectors, other)
            for file in shard.files:  # float16 has no scales: the listed files stay, empty
                if not (path / file.path).exists():
                    (path / file.path).parent.mkdir(exist_ok=True)
                    (path / file.path).write_bytes(b"")

    forge(small, exchange)
    with pytest.raises(ShardCorrupt, match=r"layer\.1 cannot be read as Zarr: (shape|data_type) is"):
        read_all(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.pop("hidden_basis"), "hidden.pca are not both there"),
        (lambda body: body["identity"]["spec"]["hidden"].pop("basis"), "has no basis"),
        (lambda body: body["hidden_basis"][0].update(path="elsewhere/zarr.json"), "not its own"),
        (lambda body: body.update(format_version=3), "format_version is 3"),
        (
            lambda body: body["identity"]["spec"]["hidden"].update(pca=None, basis=None),
            "hidden.pca are not both there",
        ),
    ],
)
def test_manifests_that_do_not_hang_together_are_refused(
    small: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewrite(small, change)
    with pytest.raises(ManifestInvalid, match=message):
        Cache.open(small)


def test_the_first_basis_that_was_kept_stays(tmp_path: Path) -> None:
    store, who = make_states.Store(tmp_path), make_states.identity(SMALL)
    assert store.basis(who) is None
    path = store.keep_basis(who, BASES)
    other = {"layer.1": BASES["layer.1"]._replace(mean=np.zeros(4, np.float32))}
    assert store.keep_basis(who, other) == path == store.basis(who)
    assert hidden.fingerprint(hidden.read_bases(path, SMALL)) == SMALL.basis
    assert not list((tmp_path / "tmp").iterdir())
