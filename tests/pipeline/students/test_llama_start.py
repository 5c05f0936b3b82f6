"""Students that start from their teacher: copied to the bit, projected without loss where nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.config.students import LlamaStudent
from pipeline.students.initialise import principal_axes
from pipeline.students.llama import Llama, initialise_llama, project_llama
from pipeline.students.llama_weights import FINAL_NORM, LLAMA_EMBEDDINGS, Sizes, choose_heads, spread_evenly
from pipeline.students.registry import build_student, load_student, save_student
from storage.errors import SpecMismatch

V, D, HEADS, KV, INNER, LAYERS = 40, 32, 4, 2, 24, 3
SIZES: dict[str, Any] = {"layers": LAYERS, "width": D, "heads": HEADS, "kv_heads": KV, "inner": INNER}


def teacher(**changes: Any) -> LlamaForCausalLM:
    """A tied Llama with random weights, its norms too, and settings that no default has."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": V, "hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "tie_word_embeddings": True,
        "initializer_range": 0.3, "rms_norm_eps": 0.1, "hidden_act": "gelu", "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    return model


def carry(model: LlamaForCausalLM, directory: Path) -> Path:
    """Its weights as a cache has them."""
    directory.mkdir(exist_ok=True)
    tensors = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    return directory


def entry(*layers: int, **changes: Any) -> LlamaStudent:
    body = {"kind": "llama", **SIZES, "layers": len(layers), "init": {"layers": list(layers)}, **changes}
    return LlamaStudent.model_validate(body)


def random(chosen: LlamaStudent, vocab_size: int = V) -> Llama:
    torch.manual_seed(1)
    model = build_student(chosen, vocab_size, 0).eval()
    assert isinstance(model, Llama)
    return model


def start(weights: Path, chosen: LlamaStudent, vocab_size: int = V) -> Llama:
    model = random(chosen, vocab_size)
    initialise_llama(model, chosen, weights)
    return model.eval()


def ids() -> torch.Tensor:
    return torch.randint(0, V, (3, 20), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def logits(model: Llama) -> torch.Tensor:
    return model(ids()) @ model.head.T


@torch.inference_mode()
def said(model: LlamaForCausalLM) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids()).logits
    return found


def without(model: LlamaForCausalLM, *layers: int) -> LlamaForCausalLM:
    """The teacher with these layers alone, in this order."""
    model.model.layers = nn.ModuleList([model.model.layers[layer] for layer in layers])
    return model


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_a_student_of_all_layers_says_what_its_teacher_says_to_the_bit(tmp_path: Path, rope: str) -> None:
    """Rows are longer than the teacher's maximum: what it makes of that belongs to its rope."""
    model = teacher(rope_parameters={"rope_theta": 500.0, **ROPES[rope]}, max_position_embeddings=8)
    student = start(carry(model, tmp_path), entry(0, 1, 2))
    assert torch.equal(logits(student), said(model))


def test_layers_are_taken_in_the_order_that_is_written(tmp_path: Path) -> None:
    model = teacher()
    student = start(carry(model, tmp_path), entry(2, 0))
    assert torch.equal(logits(student), said(without(model, 2, 0)))


def test_weights_in_bfloat16_become_a_student_in_float32(tmp_path: Path) -> None:
    model = teacher()
    weights = carry(model, tmp_path)
    tensors = {n: tensor.bfloat16() for n, tensor in load_file(weights / "model.safetensors").items()}
    save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    student = start(weights, entry(0, 1, 2))
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32}
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    assert torch.equal(logits(student), said(model))


def test_one_key_and_value_head_for_each_head_says_the_same(tmp_path: Path) -> None:
    """The teacher's grouped ones are repeated."""
    model = teacher()
    student = start(carry(model, tmp_path), entry(0, 1, 2, kv_heads=None))
    assert torch.allclose(logits(student), said(model), atol=1e-5)


@pytest.mark.parametrize("kept", [V - 7, V + 5])
def test_another_number_of_ids_takes_the_teachers_first(tmp_path: Path, kept: int) -> None:
    """Padding of the teacher's vocabulary is cut; ids that it has not are random."""
    model = teacher()
    student = start(carry(model, tmp_path), entry(0), kept)
    own = student.head.detach()
    both = min(V, kept)
    assert torch.equal(own[:both], model.model.embed_tokens.weight.detach()[:both])
    assert torch.equal(own[both:], random(entry(0), kept).head.detach()[both:])


@pytest.mark.parametrize("started", [True, False])
def test_what_is_saved_comes_back_to_the_bit_and_transformers_loads_it(tmp_path: Path, started: bool) -> None:
    chosen = entry(0, 2, width=16, heads=2, kv_heads=1, inner=10)
    student = start(carry(teacher(), tmp_path / "weights"), chosen) if started else random(chosen)
    save_student(tmp_path / "x", student, chosen, V, 0)
    again = load_student(tmp_path / "x")
    assert isinstance(again, Llama)
    assert torch.equal(logits(again), logits(student))
    settings = again.model.config
    assert settings.rope_parameters["rope_theta"] == (500.0 if started else 10_000.0)
    assert settings.num_key_value_heads == 1
    assert torch.equal(said(AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()), logits(student))


def spin(model: LlamaForCausalLM, width: int) -> torch.Tensor:
    """Let embeddings and all that blocks write lie in a random subspace of this width; return its axes."""
    axes, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))
    axes = axes[:, :width]
    state = model.state_dict()
    spread = torch.linspace(2, 0.5, width)  # distinct, so that principal axes are well defined
    state[LLAMA_EMBEDDINGS].copy_(
        torch.randn(V, width, generator=torch.Generator().manual_seed(4)) * spread @ axes.T
    )
    for name, tensor in state.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.copy_(axes @ axes.T @ tensor)
    return axes


@pytest.mark.parametrize("width", [D, 20, 8])
def test_projection_loses_nothing_where_the_teacher_has_no_more_dimensions(
    tmp_path: Path, width: int
) -> None:
    """All heads are kept. The final norm is the same for all dimensions; others are folded. eps is large."""
    model = teacher()
    spin(model, width)
    model.model.norm.weight.data.fill_(1.3)
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    axes = principal_axes(tensors[LLAMA_EMBEDDINGS], tensors[FINAL_NORM], width)
    made = project_llama(tensors, axes, LAYERS)
    settings = LlamaConfig(**{**model.config.to_dict(), "hidden_size": width, "head_dim": D // HEADS})
    student = LlamaForCausalLM(settings).eval()
    student.load_state_dict({**made, "lm_head.weight": made[LLAMA_EMBEDDINGS]})
    assert said(model).abs().max() > 1
    assert torch.allclose(said(student), said(model), atol=5e-4)
    assert torch.allclose(axes.T @ axes, torch.eye(width), atol=1e-6)


def test_dimensions_that_the_final_norm_treats_apart_are_not_rotated(tmp_path: Path) -> None:
    """A head that is tied to the embeddings could not undo it."""
    model = teacher()
    model.model.norm.weight.data.fill_(1.3)
    model.model.norm.weight.data[[3, 17]] = torch.tensor([-2.0, 6.0])
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    axes = principal_axes(tensors[LLAMA_EMBEDDINGS], tensors[FINAL_NORM], D)
    assert axes[:, 0].nonzero().tolist() == [[17]]
    assert axes[:, 1].nonzero().tolist() == [[3]]
    made = project_llama(tensors, axes, LAYERS)
    student = LlamaForCausalLM(model.config).eval()
    student.load_state_dict({**made, "lm_head.weight": made[LLAMA_EMBEDDINGS]})
    assert torch.allclose(said(student), said(model), atol=5e-4)


def test_the_final_norm_of_a_student_is_the_least_squares_of_its_teachers() -> None:
    """Logits for all states [D], over the weights that the student's norm can have."""
    tensors = {n: t for n, t in teacher().state_dict().items() if n in (LLAMA_EMBEDDINGS, FINAL_NORM)}
    embeddings, norm = tensors[LLAMA_EMBEDDINGS].double(), tensors[FINAL_NORM].double()
    axes = principal_axes(tensors[LLAMA_EMBEDDINGS], tensors[FINAL_NORM], 12)
    found = project_llama(tensors, axes, 0)
    read = axes.double() * (12 / D) ** 0.5  # a teacher's normalised state, as the student has it
    maps = torch.einsum("vw,dw->wvd", embeddings @ axes.double() * (12 / D) ** 0.5, read).flatten(1).T
    target = (embeddings * norm @ axes.double() @ axes.double().T).flatten()
    best = torch.linalg.lstsq(maps, target[:, None]).solution[:, 0]
    assert torch.allclose(found[FINAL_NORM].double(), best, atol=1e-5)


def test_neurons_that_say_most_are_kept_in_their_order(tmp_path: Path) -> None:
    """Those that say nothing read what the norm silences, or have no say on the way in or out."""
    model, quiet = teacher(), [1, 4, 5, 11, 20]
    first, second, third = model.model.layers
    first.post_attention_layernorm.weight.data[:4] = 0
    first.mlp.gate_proj.weight.data[quiet, 4:] = 0
    first.mlp.gate_proj.weight.data[quiet, :4] = 10
    second.mlp.up_proj.weight.data[quiet] = 0
    third.mlp.down_proj.weight.data[:, quiet] = 0
    student = start(carry(model, tmp_path), entry(0, 1, 2, inner=INNER - len(quiet)))
    assert torch.allclose(logits(student), said(model), atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "query", "kv"),
    [
        (9, 3, [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2]),
        (9, 9, [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (3, 3, [1, 4, 7], [0, 1, 2]),
        (3, 1, [3, 4, 5], [1]),
        (6, 2, [0, 1, 2, 6, 7, 8], [0, 2]),
        (4, 4, [1, 3, 5, 7], [0, 1, 1, 2]),
        (1, 1, [4], [1]),
    ],
)
def test_each_head_comes_with_the_key_and_value_head_that_it_reads(
    heads: int, kv_heads: int, query: list[int], kv: list[int]
) -> None:
    found = choose_heads(heads, kv_heads, Sizes(width=576, heads=9, kv_heads=3, head_width=64, inner=1536))
    assert found == (query, kv)
    for place, head in enumerate(query):
        assert kv[place * kv_heads // heads] == head // 3


def test_heads_that_are_left_out_are_as_if_they_wrote_nothing(tmp_path: Path) -> None:
    model = teacher(num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    weights = carry(model, tmp_path)
    chosen = entry(0, 1, 2, heads=4, kv_heads=4)
    kept = choose_heads(4, 4, Sizes(D, 8, 4, 8, INNER)).query
    for layer in model.model.layers:
        out = layer.self_attn.o_proj.weight.data.view(D, 8, 8)
        out[:, [head for head in range(8) if head not in kept]] = 0
    assert torch.allclose(logits(start(weights, chosen)), said(model), atol=1e-5)


def test_evenly_takes_the_middles_of_equal_parts() -> None:
    assert spread_evenly(3, 9) == [1, 4, 7]
    assert spread_evenly(5, 5) == [0, 1, 2, 3, 4]
    assert spread_evenly(4, 2) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"width": 16, "heads": 4},
            ("width / heads", "16 / 4 = 4", "heads: 4 goes with width: 32", "heads: 2"),
        ),
        ({"width": 40, "heads": 5, "kv_heads": None}, ("width", "at most 32", "heads", "at most 4")),
        (
            {"heads": 3, "width": 24, "kv_heads": 1},
            ("kv_heads", "1, for 3 heads each", "at most 2 heads for"),
        ),
        ({"inner": 25}, ("inner", "25", "at most 24")),
        ({"inner": None}, ("inner", "88", "Write inner: 24, or less.")),
    ],
)
def test_a_student_of_sizes_that_do_not_fit_is_refused_with_those_that_do(
    tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    weights = carry(teacher(), tmp_path)
    with pytest.raises(SpecMismatch, match="cannot start from") as refused:
        start(weights, entry(0, 1, **changes))
    assert all(part in str(refused.value) for part in parts), str(refused.value)


def test_a_layer_that_is_not_carried_is_refused_with_those_that_are(tmp_path: Path) -> None:
    weights = carry(teacher(), tmp_path)
    with pytest.raises(SpecMismatch, match=r"init\.layers +\[0, 7\] +of \[0, 1, 2\]"):
        start(weights, entry(0, 7))


def sequences(num: int, seed: int) -> torch.Tensor:
    """Ids that mostly follow a fixed rule: something that a small model learns."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, V, (num,), generator=generator)]
    for _ in range(15):
        noise = torch.randint(0, V, (num,), generator=generator)
        keeps = torch.rand(num, generator=generator) < 0.9
        rows.append(torch.where(keeps, (3 * rows[-1] + 7) % V, noise))
    return torch.stack(rows, 1)


def loss(logits_of: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits_of(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@pytest.fixture(scope="module")
def learned() -> LlamaForCausalLM:
    """A teacher that has learned the rule with embeddings of rank 16."""
    model = teacher(initializer_range=0.1, rms_norm_eps=1e-6, rope_parameters=None, hidden_act="silu").train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(120):
        optimizer.zero_grad()
        loss(lambda batch: model(input_ids=batch).logits, sequences(32, step)).backward()
        optimizer.step()
        with torch.no_grad():
            weight = model.model.embed_tokens.weight
            left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
            weight.copy_(left[:, :16] * sizes[:16] @ right[:16])
    return model.eval()


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (2, 2)])
def test_a_projected_student_knows_at_the_start_what_a_random_one_does_not(
    learned: LlamaForCausalLM, tmp_path: Path, heads: int, kv_heads: int
) -> None:
    chosen = entry(0, 1, 2, width=16, heads=heads, kv_heads=kv_heads, inner=16)
    batch = sequences(64, 999)
    projected = start(carry(learned, tmp_path), chosen)
    with torch.inference_mode():
        found = {
            name: loss(lambda ids, model=model: model(ids) @ model.head.T, batch).item()
            for name, model in (("random", random(chosen)), ("projected", projected))
        }
        found["teacher"] = loss(lambda ids: learned(input_ids=ids).logits, batch).item()
    assert found["teacher"] < found["projected"] < found["random"] - 1
