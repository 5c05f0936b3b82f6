"""Logits from states, a chunk at a time, are the model's own, whatever the architecture does to them."""

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.engines import language_head
from pipeline.engines.language_head import CHUNK_BYTES, LanguageHead
from pipeline.streaming.model_inputs import for_transformers
from storage.errors import TeacherError

V = 83
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes}))


def biased_head() -> Any:
    """A head with a bias, as some fine-tuned models have."""
    model = llama(tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(16, V)
    return model


ARCHITECTURES = {
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, untied": lambda: llama(tie_word_embeddings=False),
    "llama, biased head": biased_head,
    "gpt-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "gemma 2, soft-cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.02)),
    "cohere, logit scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=7.0)),
    "granite, logits scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.01)),
    "bert, masked": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=V,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    ),
}


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 9, 5 and 1 tokens."""
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [5], [1]])
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask}


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.inference_mode()
def test_log_probabilities_are_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    inputs = batch()
    mask = inputs["attention_mask"]
    expected = model(**for_transformers(inputs)).logits[mask].log_softmax(-1)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 4 * V)  # chunks of 4 of 15 positions
    head = LanguageHead(model, V)
    head.check(inputs)
    chunks = list(head.logits(head.states(inputs)[mask]))
    assert [len(chunk) for chunk in chunks] == [4, 4, 4, 3]
    assert torch.allclose(torch.cat(chunks).log_softmax(-1), expected, atol=1e-5)


@torch.inference_mode()
def test_the_head_sees_one_position_of_a_row_and_never_the_matrix() -> None:
    model = llama().eval()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    LanguageHead(model, V).states(batch())
    assert seen == [(3, 1, V)]


@torch.inference_mode()
def test_padding_of_the_vocabulary_is_cut_off() -> None:
    head = LanguageHead(llama(vocab_size=V + 13).eval(), V)
    inputs = batch()
    assert next(iter(head.logits(head.states(inputs)[inputs["attention_mask"]]))).shape[1] == V


@torch.inference_mode()
def test_an_unknown_treatment_of_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard: a soft-cap that is not known about is found by comparison, before anything is captured."""
    monkeypatch.setattr(language_head, "_behind_the_head", lambda config: lambda logits: logits)
    torch.manual_seed(0)
    head = LanguageHead(ARCHITECTURES["cohere, logit scale"]().eval(), V)
    with pytest.raises(TeacherError, match="unknown here"):
        head.check(batch())


def test_a_model_without_a_vocabulary_head_is_refused() -> None:
    model = BertModel(BertConfig(vocab_size=V, hidden_size=16, num_attention_heads=2, intermediate_size=24))
    with pytest.raises(TeacherError, match="no output embeddings"):
        LanguageHead(model, V)
