"""From params.yaml to a verified cache of hidden states, for every task: what it holds is what
the teacher thinks.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.capture import fitted_tables
from pipeline.capture.capture import capture_cache
from pipeline.capture.fitted_tables import BASIS_VECTORS
from pipeline.capture.identity import capture_identity, with_tables
from pipeline.capture.job import CaptureJob
from pipeline.capture.verify import verify_cache
from pipeline.config.caches import CacheEntry
from pipeline.config.tasks import TASKS
from pipeline.engines.engine import engine_inputs
from pipeline.engines.hidden_states import principal_components
from pipeline.engines.loading import load_classifier, load_language_model
from pipeline.engines.registry import engine_for
from pipeline.runtime import hardware
from pipeline.teachers.record import teacher_reader
from storage import Cache, hidden
from storage.errors import ShardCorrupt, SpecMismatch, TeacherError
from storage.records import LogitRows
from storage.seal import SealedParts, seal
from storage.writer import Store
from tests import toy
from tests.pipeline.conftest import World
from tests.pipeline.encoders import Project
from tests.pipeline.engines.test_hidden_states import llama
from tests.pipeline.prose import Prose


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path / "own")


def entry(world: World, **hidden: Any) -> CacheEntry:
    body = {"dataset": "toy", "teacher": "tiny", "hidden": hidden, "precision": "float32", "shard_rows": 32}
    return CacheEntry.model_validate(body)


def seal_and_check(world: World, **hidden: Any) -> Cache:
    """The cache with these hidden states, captured and verified."""
    made = entry(world, **hidden)
    capture_cache(CaptureJob("toy", made, world.dataset, world.teacher, world.cache, world.store))
    cache = Cache.open(world.cache)
    capture_check(world, made)
    return cache


def capture_check(world: World, made: CacheEntry) -> None:
    verify_cache("toy", Cache.open(world.cache), made, world.dataset, world.teacher)


def live(world: World, cache: Cache, layer: int) -> np.ndarray:
    """[positions, W] states of all rows in cache order, each row read by the teacher alone."""
    rows, reader = world.rows(), teacher_reader(world.teacher)
    hardware.pin_threads(1)  # the capture takes all cores: for small tensors far too many
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    place = {row: i for i, row in enumerate(rows.row_ids.to_pylist())}
    model, found = load_classifier(world.teacher), []
    with torch.inference_mode():
        for row in cache.row_ids().to_pylist():
            ids = torch.from_numpy(tokens.row(place[row]).astype(np.int64))[None]
            found.append(model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0].numpy())
    return np.concatenate(found)


def everything(cache: Cache, name: str) -> np.ndarray:
    return np.concatenate([cache.hidden(shard, name) for shard in cache.shards])


@pytest.mark.parametrize(("dtype", "step"), [("float32", 0), ("float16", 2**-11), ("int8", 0.5 / 127)])
def test_a_classifiers_states_of_each_token_are_those_of_the_live_teacher(
    own: World, dtype: str, step: float
) -> None:
    cache = seal_and_check(own, layers=[0, 2], qkv=[2], pool="none", dtype=dtype)
    assert cache.hidden_names == ("layer.0", "layer.2", "qkv.2")
    assert cache.manifest.format_version == 4
    for layer in (0, 2):
        expected = live(own, cache, layer)
        error = np.abs(everything(cache, f"layer.{layer}") - expected).max(1)
        assert (error <= step * np.abs(expected).max(1) + 1e-5).all()
    assert everything(cache, "qkv.2").shape == (len(expected), 3 * toy.WIDTH)


def test_components_lose_the_sum_of_the_other_eigenvalues_on_the_rows_that_they_were_fitted_on(
    own: World,
) -> None:
    cache = seal_and_check(own, layers=[1], pool="none", dtype="float32", pca=5)
    exact, (mean, axes) = live(own, cache, 1), cache.hidden_basis("layer.1")
    assert axes.shape == (5, toy.WIDTH)
    back = mean + everything(cache, "layer.1") @ axes
    lost = ((exact - back).astype(np.float64) ** 2).sum(1).mean()
    eigenvalues = np.linalg.eigvalsh(np.cov(exact.astype(np.float64).T, bias=True))
    assert lost == pytest.approx(eigenvalues[: toy.WIDTH - 5].sum(), rel=1e-4)
    assert len(exact) < BASIS_VECTORS, "the basis is of all of them"


def test_a_cache_that_grew_keeps_its_basis_and_computes_the_new_rows_alone(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fitted_tables, "BASIS_VECTORS", 200
    )  # fewer than there are: rows that come later do not count
    hidden_entry = {"layers": (2,), "qkv": (1,), "pool": "none", "dtype": "float16", "pca": 4}
    before = seal_and_check(own, **hidden_entry)
    basis, keys = before.hidden_basis("layer.2"), {shard.key for shard in before.shards}
    toy.write_csv(own.root / "reviews.csv", num=140)
    own.prepare()
    made = entry(own, **hidden_entry)
    done = capture_cache(CaptureJob("toy", made, own.dataset, own.teacher, own.cache, own.store))
    after = Cache.open(own.cache)
    kept = [shard.rows for shard in after.shards if shard.key in keys]
    assert 0 < sum(kept) == after.num_rows - done.computed_rows
    for part, same in zip(after.hidden_basis("layer.2"), basis, strict=True):
        assert np.array_equal(part, same)
    again = capture_cache(
        CaptureJob("toy", made, own.dataset, own.teacher, own.cache, own.store, never_loaded)
    )
    assert again.computed_rows == 0


def never_loaded() -> None:
    raise AssertionError("the teacher was loaded")


def test_pooled_states_can_be_components_too(own: World) -> None:
    cache = seal_and_check(own, layers=[1], pool="mean", pca=3)
    assert everything(cache, "layer.1").shape == (180, 3)
    assert cache.manifest.format_version == 4


def test_another_number_of_components_is_another_cache(own: World) -> None:
    seal_and_check(own, layers=[1], pool="none", pca=3)
    with pytest.raises(SpecMismatch, match=r"spec\.hidden\.pca +3 +4"):
        capture_check(own, entry(own, layers=[1], pool="none", pca=4))


@pytest.mark.parametrize(
    "hidden_entry",
    [
        {"layers": (1, 2), "pool": "mean"},
        {"layers": (2,), "pool": "none", "dtype": "int8"},
        {"qkv": (1,), "pool": "none"},
        {"layers": (1,), "pool": "none", "pca": 4},
    ],
)
def test_a_replay_finds_states_that_the_teacher_never_had(own: World, hidden_entry: dict[str, Any]) -> None:
    """Sealed with right digests by someone whose states are a little too large."""
    made = entry(own, **hidden_entry)
    identity, store = capture_identity(made, own.teacher), Store(own.root / "other")
    assert identity.spec.hidden is not None
    rows, reader = own.rows(), teacher_reader(own.teacher)
    inputs = engine_inputs(own.teacher, identity.spec, reader, rows)
    output = engine_for(inputs).answer(np.arange(len(rows.row_ids)))
    assert isinstance(output.kept, LogitRows)
    bases = {
        name: principal_components(output.hidden[name], 4) for name in identity.spec.hidden.component_names
    }
    basis = store.keep_basis(identity, bases) if bases else None
    identity = with_tables(identity, None, hidden.fingerprint(bases) if bases else None)
    for factor, sound in ((1.0, True), (1.05, False)):
        states = {name: vectors * np.float32(factor) for name, vectors in output.hidden.items()}
        states |= {name: bases[name].components(states[name]) for name in bases}
        shard = Store(own.root / str(factor)).put(identity, output.kept, states, 1.0)
        files = {"tokenizer.json": (own.teacher / "tokenizer.json").read_bytes()}
        seal(own.cache, SealedParts(identity, [shard], files, {}, basis=basis))
        if sound:
            capture_check(own, made)
        else:
            with pytest.raises(SpecMismatch, match=r"row \w+: (layer|qkv)\.\d\[\d+\]"):
                capture_check(own, made)


def test_a_flipped_byte_of_the_states_is_refused_by_name(own: World) -> None:
    cache = seal_and_check(own, layers=[1], pool="none", dtype="int8", pca=4)
    path = own.cache / cache.shards[1].hidden_path / "layer.1.scale" / "c.0"
    raw = path.read_bytes()
    path.unlink()  # a link into the store: that one stays
    path.write_bytes(raw[:9] + bytes([raw[9] ^ 1]) + raw[10:])
    with pytest.raises(ShardCorrupt, match=r"layer\.1\.scale/c\.0 is damaged"):
        capture_check(own, entry(own, layers=[1], pool="none", dtype="int8", pca=4))


@pytest.mark.parametrize(
    ("hidden_entry", "message"),
    [
        ({"layers": [3], "pool": "none"}, r"layers 0 \(embeddings\) to 2, not \[3\]"),
        ({"qkv": [3], "pool": "none"}, r"attention blocks 1 to 2, not \[3\]"),
        ({"layers": [1], "pca": 17}, "have 16 numbers, fewer than 17"),
    ],
)
def test_what_the_teacher_has_not_is_refused_before_it_is_loaded(
    own: World, hidden_entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        capture_cache(
            CaptureJob(
                "toy",
                entry(own, **hidden_entry),
                own.dataset,
                own.teacher,
                own.cache,
                own.store,
                never_loaded,
            )
        )


@pytest.mark.parametrize("task", ["token-classification", "masked-lm"])
def test_encoders_with_a_target_a_token_keep_their_states_too(task: str, tmp_path: Path) -> None:
    project = Project.start(tmp_path, task)
    project.make_teacher()
    hidden_entry = {"layers": [1], "qkv": [2], "pool": "none", "dtype": "float32"}
    project.capture(hidden=hidden_entry)
    cache = Cache.open(project.cache)
    project.check(hidden=hidden_entry)
    check_states_of_tokens(cache, teachers_model(project.teacher, task))


def test_language_models_keep_their_states_and_their_entries(tmp_path: Path) -> None:
    prose = Prose(tmp_path)
    prose.make_teacher()
    made = prose.entry().model_copy(
        update={"hidden": entry_hidden(layers=[0, 2], qkv=[1], pool="none", dtype="float32")}
    )
    store = Store(tmp_path / "store")
    capture_cache(CaptureJob("prose", made, prose.dataset, prose.teacher, prose.cache, store))
    cache = Cache.open(prose.cache)
    verify_cache("prose", cache, made, prose.dataset, prose.teacher)
    check_states_of_tokens(cache, load_language_model(prose.teacher, "float32"))


def test_a_teacher_without_such_projections_is_refused_before_it_reads_a_row(tmp_path: Path) -> None:
    prose = Prose(tmp_path)
    llama(num_key_value_heads=1, vocab_size=100, max_position_embeddings=128).save_pretrained(
        tmp_path / "model"
    )
    prose.make_teacher()
    made = prose.entry().model_copy(update={"hidden": entry_hidden(qkv=[1], pool="none")})
    with pytest.raises(TeacherError, match="grouped queries share keys and values"):
        capture_cache(
            CaptureJob("prose", made, prose.dataset, prose.teacher, prose.cache, Store(tmp_path / "store"))
        )
    assert not list((tmp_path / "store").rglob("*.json")), "frequent ids were not computed either"


def entry_hidden(**hidden: Any) -> Any:
    body = {"dataset": "prose", "teacher": "tiny", "hidden": hidden}
    return CacheEntry.model_validate(body).hidden


def teachers_model(teacher: Path, task: Any) -> Any:
    if task == "masked-lm":
        return load_language_model(teacher, "float32", TASKS[task].auto_class)
    return load_classifier(teacher, task=task)


def check_states_of_tokens(cache: Cache, model: Any) -> None:
    """States of the first rows are those of the live model, run on the row alone."""
    hardware.pin_threads(1)
    shard = cache.shards[0]
    rows = cache.read(shard)
    assert rows.token_ids is not None
    first = 0
    for length in rows.num_tokens[:6]:
        own = slice(first, first + int(length))
        ids = torch.from_numpy(rows.token_ids[own].astype(np.int64))[None]
        with torch.inference_mode():
            alone = model(input_ids=ids, output_hidden_states=True).hidden_states
        for name in cache.hidden_names:
            if name.startswith("layer."):
                expected = alone[int(name.split(".")[1])][0].numpy()
                assert cache.hidden(shard, name)[own] == pytest.approx(expected, abs=2e-5)
        first += int(length)
