"""GGUF files, written here by the gguf library as llama.cpp writes them, become teachers of plain tensors."""

import json
import re
import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pipeline.data.tokenizer import TextReader
from pipeline.engines.loading import convert_gguf, load_language_model
from pipeline.engines.model_files import teacher_identity
from storage.errors import AssetError, TeacherError
from tests import toy
from tests.pipeline.prose import Prose

WIDTH, LAYERS, HEADS, KV_HEADS, END = 64, 2, 4, 2, "<|endoftext|>"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}
Kind = gguf.GGMLQuantizationType
F32, F16 = Kind.F32, Kind.F16


def tokenizer() -> Tokenizer:
    """A byte-level BPE, as GPT-2 and its kin have."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(toy.texts(50), trainer)
    return made


def llama(vocab_size: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def stored_rows(name: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """llama.cpp turns the two halves of a rotation into neighbours: rows of q and k are in another order."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(path: Path, kind: Kind, tied: bool = False) -> LlamaForCausalLM:
    """Write a Llama of two layers, its matrices as `kind`; return the model that the file holds."""
    words = tokenizer()
    vocab = [token for token, _ in sorted(words.get_vocab().items(), key=lambda pair: pair[1])]
    model = llama(len(vocab), tied)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([3 if token == END else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(words.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    held = {}
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        own = kind if weight.ndim == 2 else F32
        packed = gguf.quants.quantize(stored_rows(name, weight), own)
        called = name
        for theirs, ours in NAMES.items():
            called = called.replace(theirs, ours)
        writer.add_tensor(called, packed, raw_dtype=own)
        held[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, own), own))
        held[name] = held[name].bfloat16().float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(held, strict=False)
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids[None]).logits
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", [F32, F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name)
def test_the_teacher_is_the_dequantised_model_in_bfloat16(tmp_path: Path, kind: Kind, tied: bool) -> None:
    held, out = write_gguf(tmp_path / "tiny.gguf", kind, tied), tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", out)
    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert ("lm_head.weight" in names) == (not tied)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    text = toy.texts(1)[0]
    ids = TextReader(out, 128, "error").read([text], ["row"]).ids
    assert ids.tolist() == tokenizer().encode(text).ids
    tokens = torch.from_numpy(ids.astype(np.int64))
    made = logits(load_language_model(out, "float32"), tokens)
    assert torch.allclose(made, logits(held, tokens), atol=1e-4)


def test_only_our_own_progress_bar_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_gguf(tmp_path / "tiny.gguf", F16)
    (tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    shown = capsys.readouterr()
    assert re.fullmatch(r"reading tiny\.gguf: 21 tensors in .* s\n", shown.err)
    assert shown.out == ""


@pytest.mark.parametrize("size", [0, 3, 20, 1000, 5000, -5000], ids=lambda size: f"{size} bytes")
def test_a_file_that_ends_early_is_refused_by_name(tmp_path: Path, size: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Kind.Q8_0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TeacherError, match=r"tiny\.gguf cannot be loaded as a GGUF file"):
        convert_gguf(path, tmp_path / "out")


def test_a_file_that_is_not_gguf_or_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("a text that is long enough for a header\n" * 9)
    for name in ("text.gguf", "nothing.gguf"):
        with pytest.raises(TeacherError, match=rf"{name} cannot be loaded as a GGUF file"):
            convert_gguf(tmp_path / name, tmp_path / "out")


def test_a_file_that_lacks_a_tensor_is_refused_and_never_filled_with_random_numbers(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, F16)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight"))
    with pytest.raises(TeacherError, match=r"tiny\.gguf .* lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(path, tmp_path / "out")


@pytest.fixture
def prose(tmp_path: Path) -> Prose:
    """Documents, and a directory with one GGUF file."""
    made = Prose(tmp_path)
    (made.root / "packed").mkdir()
    write_gguf(made.root / "packed" / "tiny.Q4_0.gguf", Kind.Q4_0)
    return made


@pytest.mark.parametrize("named", ["packed", "packed/tiny.Q4_0.gguf"])
def test_a_file_or_a_directory_with_one_is_a_teacher(prose: Prose, named: str) -> None:
    record = prose.make_teacher(model=str(prose.root / named))
    assert record["task"] == "causal-lm"
    assert record["vocab_size"] == 300
    assert 0 < record["reading"]["test"]["loss"] < 12
    assert {path.name for path in prose.teacher.iterdir()} == {
        "config.json", "model.safetensors", "teacher.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


def test_of_two_files_none_is_chosen(prose: Prose) -> None:
    packed = prose.root / "packed"
    shutil.copy(packed / "tiny.Q4_0.gguf", packed / "tiny.Q8_0.gguf")
    shutil.copy(prose.root / "model" / "config.json", packed)
    with pytest.raises(AssetError, match=r"nor one \*\.gguf \(found 2 of these\)"):
        prose.make_teacher(model=str(packed))


def test_a_model_is_taken_before_its_quantised_copies(prose: Prose) -> None:
    shutil.copy(prose.root / "packed" / "tiny.Q4_0.gguf", prose.root / "model")
    prose.make_teacher()
    assert teacher_identity(prose.teacher) == teacher_identity(prose.root / "model")


def test_a_model_too_large_for_one_file_of_weights_is_loaded_from_several(
    prose: Prose, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts = partialmethod(PreTrainedModel.save_pretrained, max_shard_size="50KB")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", in_parts)
    prose.make_teacher(model=str(prose.root / "packed"))
    assert len(list(prose.teacher.glob("*.safetensors"))) > 1
