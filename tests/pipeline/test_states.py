"""What is overheard of a teacher is what it thinks: against live models, by architecture, from all tasks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline import asking, capture, hardware, replay, states, teachers
from pipeline.config_teachers import CacheEntry
from pipeline.states import Overheard, principal
from storage import Cache, hidden
from storage.errors import ShardCorrupt, SpecMismatch, TeacherError
from storage.records import LogitRows
from storage.spec import HiddenSpec
from storage.writer import Store, seal
from tests import toy
from tests.pipeline.conftest import World
from tests.pipeline.encoders import Project
from tests.pipeline.test_language_caches import Prose

W, V = 16, 40
LENGTHS = np.array([5, 3])


def random_weights(model: Any) -> Any:
    """The model with weights that are all different, biases and norms too."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def bert() -> Any:
    config = BertConfig(
        vocab_size=V, hidden_size=W, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return BertForSequenceClassification(config)


def distilbert() -> Any:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=V, dim=W, n_layers=2, n_heads=2, hidden_dim=24)
    )


def llama(**changes: Any) -> Any:
    config = {
        "vocab_size": V, "hidden_size": W, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes}))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=W, n_layer=2, n_head=2, n_positions=32))


def bert_qkv(model: Any, state: torch.Tensor, block: int) -> torch.Tensor:
    own = model.bert.encoder.layer[block - 1].attention.self
    return torch.cat([state @ m.weight.T + m.bias for m in (own.query, own.key, own.value)], -1)


def distilbert_qkv(model: Any, state: torch.Tensor, block: int) -> torch.Tensor:
    own = model.distilbert.transformer.layer[block - 1].attention
    return torch.cat([state @ m.weight.T + m.bias for m in (own.q_lin, own.k_lin, own.v_lin)], -1)


def llama_qkv(model: Any, state: torch.Tensor, block: int) -> torch.Tensor:
    layer = model.model.layers[block - 1]
    scale = state.pow(2).mean(-1, keepdim=True).add(1e-3).rsqrt()
    normed = state * scale * layer.input_layernorm.weight
    own = layer.self_attn
    return torch.cat([normed @ m.weight.T for m in (own.q_proj, own.k_proj, own.v_proj)], -1)


def gpt2_qkv(model: Any, state: torch.Tensor, block: int) -> torch.Tensor:
    layer = model.transformer.h[block - 1]
    apart = state - state.mean(-1, keepdim=True)
    normed = apart / (apart.pow(2).mean(-1, keepdim=True) + layer.ln_1.eps).sqrt()
    normed = normed * layer.ln_1.weight + layer.ln_1.bias
    return normed @ layer.attn.c_attn.weight + layer.attn.c_attn.bias


def spec(**changes: Any) -> HiddenSpec:
    known = {"layers": (0, 2), "qkv": (1, 2), "pool": "none", "width": W, "dtype": "float32"}
    return HiddenSpec.model_validate({**known, **changes})


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of ids, the second padded, and the mask of true tokens."""
    ids_BL = torch.arange(10).reshape(2, 5) * 3 % V
    return ids_BL, torch.arange(5) < torch.from_numpy(LENGTHS)[:, None]


@pytest.mark.parametrize(
    ("make", "by_hand"),
    [(bert, bert_qkv), (distilbert, distilbert_qkv), (llama, llama_qkv), (gpt2, gpt2_qkv)],
    ids=["bert", "distilbert", "llama", "gpt2"],
)
def test_queries_keys_and_values_are_those_computed_by_hand_from_the_state_before(
    make: Any, by_hand: Any
) -> None:
    """From the weights and hidden_states of each row read alone: no padding, no hooks."""
    model, (ids_BL, mask_BL) = random_weights(make()), batch()
    heard = Overheard(model, spec(), LENGTHS, np.arange(2))
    with torch.inference_mode():
        with heard.hear(np.arange(2), mask_BL):
            model(input_ids=ids_BL, attention_mask=mask_BL.long())
        first = 0
        for ids, length in zip(ids_BL, LENGTHS, strict=True):
            alone = model(input_ids=ids[None, :length], output_hidden_states=True).hidden_states
            own = slice(first, first + length)
            for layer in (0, 2):
                expected = alone[layer][0].numpy()
                assert heard.found[f"layer.{layer}"][own] == pytest.approx(expected, abs=2e-5)
            for block in (1, 2):
                expected = by_hand(model, alone[block - 1][0], block).numpy()
                assert heard.found[f"qkv.{block}"].shape == (8, 3 * W)
                assert heard.found[f"qkv.{block}"][own] == pytest.approx(expected, abs=2e-5)
            first += length


def test_no_hook_is_left_behind_and_nothing_is_asked_for_without_one() -> None:
    model, (ids_BL, mask_BL) = bert().eval(), batch()
    heard = Overheard(model, spec(), LENGTHS, np.arange(2))
    with pytest.raises(RuntimeError, match="on the way"), heard.hear(np.arange(2), mask_BL):
        raise RuntimeError("on the way")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model(input_ids=ids_BL).hidden_states is None
    assert not heard.found


def test_architectures_that_are_not_known_are_refused_by_name() -> None:
    unknown = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=V, hidden_size=W, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    )
    with pytest.raises(TeacherError, match="GPTNeoXForCausalLM has its queries, keys and values of block 1"):
        states.projections(unknown, 1, W)


def test_grouped_queries_are_refused_with_their_widths() -> None:
    with pytest.raises(TeacherError, match=r"16 numbers to \[16, 8, 8\] numbers in block 2"):
        states.projections(llama(num_key_value_heads=1), 2, W)


def test_a_model_with_two_stacks_of_such_blocks_is_refused() -> None:
    two = torch.nn.ModuleList([bert(), bert()])
    with pytest.raises(TeacherError, match="nowhere that is known"):
        states.projections(two, 1, W)


def test_a_state_that_is_no_number_names_the_row() -> None:
    model, (ids_BL, mask_BL) = random_weights(bert()), batch()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[int(ids_BL[1, 2])] = float("nan")
    heard = Overheard(model, spec(), LENGTHS, np.array([7, 8]), [f"row{i}" for i in range(9)])
    with (
        pytest.raises(TeacherError, match=r"hidden state layer\.0 for row row8 are not finite"),
        torch.inference_mode(),
        heard.hear(np.arange(2), mask_BL),
    ):
        model(input_ids=ids_BL, attention_mask=mask_BL.long())


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_what_components_lose_is_the_sum_of_the_eigenvalues_left_out(kept: int) -> None:
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(500, 6)) @ random.normal(size=(6, 6)) + 3).astype(np.float32)
    basis = principal(vectors, kept)
    back = basis.mean + basis.components(vectors) @ basis.axes
    lost = ((vectors - back).astype(np.float64) ** 2).sum(1).mean()
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.astype(np.float64).T, bias=True))
    assert lost == pytest.approx(eigenvalues[: 6 - kept].sum(), rel=1e-5, abs=1e-9)
    assert basis.axes @ basis.axes.T == pytest.approx(np.eye(kept), abs=1e-6)
    assert (np.take_along_axis(basis.axes, np.abs(basis.axes).argmax(1)[:, None], 1) > 0).all()


# From params.yaml to a verified cache.


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path / "own")


def entry(world: World, **hidden: Any) -> CacheEntry:
    body = {"dataset": "toy", "teacher": "tiny", "hidden": hidden, "precision": "float32", "shard_rows": 32}
    return CacheEntry.model_validate(body)


def seal_and_check(world: World, **hidden: Any) -> Cache:
    """The cache with these hidden states, captured and verified."""
    made = entry(world, **hidden)
    capture.capture("toy", made, world.dataset, world.teacher, world.cache, world.store)
    cache = Cache.open(world.cache)
    capture_check(world, made)
    return cache


def capture_check(world: World, made: CacheEntry) -> None:
    replay.check("toy", Cache.open(world.cache), made, world.dataset, world.teacher)


def live(world: World, cache: Cache, layer: int) -> np.ndarray:
    """[positions, W] states of all rows in cache order, each row read by the teacher alone."""
    rows, reader = world.rows(), teachers.reader(world.teacher)
    hardware.pin_threads(1)  # the capture takes all cores: for small tensors far too many
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    place = {row: i for i, row in enumerate(rows.row_ids.to_pylist())}
    model, found = teachers.load(world.teacher), []
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


def test_components_lose_what_the_eigenvalues_say_on_the_rows_that_they_were_fitted_on(own: World) -> None:
    cache = seal_and_check(own, layers=[1], pool="none", dtype="float32", pca=5)
    exact, (mean, axes) = live(own, cache, 1), cache.hidden_basis("layer.1")
    assert axes.shape == (5, toy.WIDTH)
    back = mean + everything(cache, "layer.1") @ axes
    lost = ((exact - back).astype(np.float64) ** 2).sum(1).mean()
    eigenvalues = np.linalg.eigvalsh(np.cov(exact.astype(np.float64).T, bias=True))
    assert lost == pytest.approx(eigenvalues[: toy.WIDTH - 5].sum(), rel=1e-4)
    assert len(exact) < capture.BASIS_VECTORS, "the basis is of all of them"


def test_a_cache_that_grew_keeps_its_basis_and_asks_for_the_new_rows_alone(
    own: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        capture, "BASIS_VECTORS", 200
    )  # fewer than there are: rows that come later do not count
    wanted = {"layers": (2,), "qkv": (1,), "pool": "none", "dtype": "float16", "pca": 4}
    before = seal_and_check(own, **wanted)
    basis, keys = before.hidden_basis("layer.2"), {shard.key for shard in before.shards}
    toy.write_csv(own.root / "reviews.csv", num=140)
    own.prepare()
    made = entry(own, **wanted)
    done = capture.capture("toy", made, own.dataset, own.teacher, own.cache, own.store)
    after = Cache.open(own.cache)
    kept = [shard.rows for shard in after.shards if shard.key in keys]
    assert 0 < sum(kept) == after.num_rows - done.computed_rows
    for part, same in zip(after.hidden_basis("layer.2"), basis, strict=True):
        assert np.array_equal(part, same)
    again = capture.capture("toy", made, own.dataset, own.teacher, own.cache, own.store, never_loaded)
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
    "wanted",
    [
        {"layers": (1, 2), "pool": "mean"},
        {"layers": (2,), "pool": "none", "dtype": "int8"},
        {"qkv": (1,), "pool": "none"},
        {"layers": (1,), "pool": "none", "pca": 4},
    ],
)
def test_a_replay_finds_states_that_the_teacher_never_had(own: World, wanted: dict[str, Any]) -> None:
    """Sealed with right digests by someone whose states are a little too large."""
    made = entry(own, **wanted)
    who, store = capture.identity(made, own.teacher), Store(own.root / "other")
    assert who.spec.hidden is not None
    rows, reader = own.rows(), teachers.reader(own.teacher)
    asked = asking.questions(own.teacher, who.spec, reader, rows.texts.to_pylist(), rows.row_ids)
    said = asking.asker(asked).ask(np.arange(len(rows.row_ids)))
    assert isinstance(said.kept, LogitRows)
    bases = {name: principal(said.hidden[name], 4) for name in who.spec.hidden.component_names}
    basis = store.keep_basis(who, bases) if bases else None
    who = capture.identity(made, own.teacher, None, hidden.fingerprint(bases) if bases else None)
    for factor, sound in ((1.0, True), (1.05, False)):
        thought = {name: vectors * np.float32(factor) for name, vectors in said.hidden.items()}
        thought |= {name: bases[name].components(thought[name]) for name in bases}
        shard = Store(own.root / str(factor)).put(who, said.kept, thought, 1.0)
        files = {"tokenizer.json": (own.teacher / "tokenizer.json").read_bytes()}
        seal(own.cache, who, [shard], files, {}, basis=basis)
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
    ("wanted", "said"),
    [
        ({"layers": [3], "pool": "none"}, r"layers 0 \(embeddings\) to 2, not \[3\]"),
        ({"qkv": [3], "pool": "none"}, r"attention blocks 1 to 2, not \[3\]"),
        ({"layers": [1], "pca": 17}, "have 16 numbers: no 17 components"),
    ],
)
def test_what_the_teacher_has_not_is_refused_before_it_is_loaded(
    own: World, wanted: dict[str, Any], said: str
) -> None:
    with pytest.raises(TeacherError, match=said):
        capture.capture(
            "toy", entry(own, **wanted), own.dataset, own.teacher, own.cache, own.store, never_loaded
        )


@pytest.mark.parametrize("task", ["token-classification", "masked-lm"])
def test_encoders_with_a_target_a_token_keep_their_states_beside_them(task: str, tmp_path: Path) -> None:
    project = Project.start(tmp_path, task)
    project.make_teacher()
    wanted = {"layers": [1], "qkv": [2], "pool": "none", "dtype": "float32"}
    project.capture(hidden=wanted)
    cache = Cache.open(project.cache)
    project.check(hidden=wanted)
    check_states_of_tokens(cache, teachers_model(project.teacher, task))


def test_language_models_keep_their_states_beside_their_entries(tmp_path: Path) -> None:
    prose = Prose(tmp_path)
    prose.make_teacher()
    made = prose.entry().model_copy(
        update={"hidden": entry_hidden(layers=[0, 2], qkv=[1], pool="none", dtype="float32")}
    )
    store = Store(tmp_path / "store")
    capture.capture("prose", made, prose.dataset, prose.teacher, prose.cache, store)
    cache = Cache.open(prose.cache)
    replay.check("prose", cache, made, prose.dataset, prose.teacher)
    check_states_of_tokens(cache, teachers.load_language(prose.teacher, "float32"))


def test_a_teacher_without_such_projections_is_refused_before_it_reads_a_row(tmp_path: Path) -> None:
    prose = Prose(tmp_path)
    llama(num_key_value_heads=1, vocab_size=100, max_position_embeddings=128).save_pretrained(
        tmp_path / "model"
    )
    prose.make_teacher()
    made = prose.entry().model_copy(update={"hidden": entry_hidden(qkv=[1], pool="none")})
    with pytest.raises(TeacherError, match="grouped queries share keys and values"):
        capture.capture("prose", made, prose.dataset, prose.teacher, prose.cache, Store(tmp_path / "store"))
    assert not list((tmp_path / "store").rglob("*.json")), "it was not asked for frequent ids either"


def entry_hidden(**hidden: Any) -> Any:
    body = {"dataset": "prose", "teacher": "tiny", "hidden": hidden}
    return CacheEntry.model_validate(body).hidden


def teachers_model(teacher: Path, task: Any) -> Any:
    if task == "masked-lm":
        return teachers.load_language(teacher, "float32", task)
    return teachers.load(teacher, task=task)


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
