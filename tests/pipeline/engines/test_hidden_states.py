"""Recorded hidden states, queries, keys and values are those of live models, by architecture."""

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

from pipeline.engines.hidden_states import HiddenStateRecorder, principal_components, projections
from storage.errors import TeacherError
from storage.spec import HiddenSpec

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
    recorder = HiddenStateRecorder(model, spec(), LENGTHS, np.arange(2))
    with torch.inference_mode():
        with recorder.record(np.arange(2), {"attention_mask": mask_BL}):
            model(input_ids=ids_BL, attention_mask=mask_BL.long())
        first = 0
        for ids, length in zip(ids_BL, LENGTHS, strict=True):
            alone = model(input_ids=ids[None, :length], output_hidden_states=True).hidden_states
            own = slice(first, first + length)
            for layer in (0, 2):
                expected = alone[layer][0].numpy()
                assert recorder.found[f"layer.{layer}"][own] == pytest.approx(expected, abs=2e-5)
            for block in (1, 2):
                expected = by_hand(model, alone[block - 1][0], block).numpy()
                assert recorder.found[f"qkv.{block}"].shape == (8, 3 * W)
                assert recorder.found[f"qkv.{block}"][own] == pytest.approx(expected, abs=2e-5)
            first += length


def test_no_hook_remains_and_without_hooks_no_states_are_computed() -> None:
    model, (ids_BL, mask_BL) = bert().eval(), batch()
    recorder = HiddenStateRecorder(model, spec(), LENGTHS, np.arange(2))
    with (
        pytest.raises(RuntimeError, match="on the way"),
        recorder.record(np.arange(2), {"attention_mask": mask_BL}),
    ):
        raise RuntimeError("on the way")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model(input_ids=ids_BL).hidden_states is None
    assert not recorder.found


def test_unknown_architectures_are_refused_by_name() -> None:
    unknown = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=V, hidden_size=W, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
    )
    with pytest.raises(TeacherError, match="block 1 are not found in GPTNeoXForCausalLM"):
        projections(unknown, 1, W)


def test_grouped_queries_are_refused_with_their_widths() -> None:
    with pytest.raises(TeacherError, match=r"16 numbers to \[16, 8, 8\] numbers in block 2"):
        projections(llama(num_key_value_heads=1), 2, W)


def test_a_model_with_two_stacks_of_such_blocks_is_refused() -> None:
    two = torch.nn.ModuleList([bert(), bert()])
    with pytest.raises(TeacherError, match="are not found in ModuleList"):
        projections(two, 1, W)


def test_a_state_that_is_not_finite_names_the_row() -> None:
    model, (ids_BL, mask_BL) = random_weights(bert()), batch()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[int(ids_BL[1, 2])] = float("nan")
    recorder = HiddenStateRecorder(model, spec(), LENGTHS, np.array([7, 8]), [f"row{i}" for i in range(9)])
    with (
        pytest.raises(TeacherError, match=r"hidden state layer\.0 for row row8 are not finite"),
        torch.inference_mode(),
        recorder.record(np.arange(2), {"attention_mask": mask_BL}),
    ):
        model(input_ids=ids_BL, attention_mask=mask_BL.long())


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_what_components_lose_is_the_sum_of_the_eigenvalues_left_out(kept: int) -> None:
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(500, 6)) @ random.normal(size=(6, 6)) + 3).astype(np.float32)
    basis = principal_components(vectors, kept)
    back = basis.mean + basis.components(vectors) @ basis.axes
    lost = ((vectors - back).astype(np.float64) ** 2).sum(1).mean()
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.astype(np.float64).T, bias=True))
    assert lost == pytest.approx(eigenvalues[: 6 - kept].sum(), rel=1e-5, abs=1e-9)
    assert basis.axes @ basis.axes.T == pytest.approx(np.eye(kept), abs=1e-6)
    assert (np.take_along_axis(basis.axes, np.abs(basis.axes).argmax(1)[:, None], 1) > 0).all()
