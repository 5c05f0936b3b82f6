"""Students by a transformers config: padding changes nothing, transformers loads them, mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.params import Workers
from pipeline.config.students import TransformersStudent
from pipeline.students.hf_config import check_padding, student_config
from pipeline.students.registry import build_student, load_student, save_student
from pipeline.students.transformers_classifier import Transformers
from pipeline.training.run import train_run
from storage import Cache
from storage.errors import ConfigError
from tests.pipeline.conftest import World
from tests.pipeline.students.test_students import CLASSES, VOCAB, batch

KINDS: dict[str, dict[str, Any]] = {
    "distilbert": {"n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 32},
    "roberta": {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "electra": {
        "embedding_size": 8, "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2},
    "llama": {
        "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
        "num_key_value_heads": 2,
    },
}  # fmt: skip


def entry(model_type: str = "distilbert", **changes: Any) -> TransformersStudent:
    config = KINDS.get(model_type, {}) | changes
    body = {"kind": "transformers", "model_type": model_type, "config": config, "max_length": 12}
    return TransformersStudent.model_validate(body)


def build(chosen: TransformersStudent, pad_id: int = 0) -> Transformers:
    torch.manual_seed(0)
    model = build_student(chosen, VOCAB, CLASSES)
    assert isinstance(model, Transformers)
    model.rebuild(student_config(chosen, VOCAB, CLASSES, pad_id))
    return model.eval()


@pytest.mark.parametrize("pad_id", [0, 1, 49])
@pytest.mark.parametrize("model_type", KINDS)
def test_neither_padding_nor_what_stands_there_nor_the_company_changes_an_answer(
    model_type: str, pad_id: int
) -> None:
    if model_type == "roberta" and pad_id == 49:  # it counts positions from behind the padding id
        with pytest.raises(ConfigError, match="cannot be built"):
            build(entry(model_type), pad_id)
        return
    model = build(entry(model_type), pad_id)
    check_padding(model, entry(model_type), VOCAB)
    with torch.inference_mode():
        together = model(*batch())
        assert torch.allclose(model(*batch(pad=7)), together, atol=1e-6)
        for row, length in enumerate((7, 1, 12, 4)):
            ids = batch()[0][row : row + 1, :length]
            assert torch.allclose(model(ids, torch.ones_like(ids).bool())[0], together[row], atol=1e-5)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_saved_student_comes_back_to_the_bit_and_transformers_loads_it(
    model_type: str, tmp_path: Path
) -> None:
    chosen = entry(model_type)
    model = build(chosen, 1)
    save_student(tmp_path, model, chosen, VOCAB, CLASSES)
    again = load_student(tmp_path)
    foreign = AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    ids, mask = batch(pad=1)
    with torch.inference_mode():
        assert torch.equal(again(ids, mask), model(ids, mask))
        assert torch.equal(foreign(input_ids=ids, attention_mask=mask.long()).logits, model(ids, mask))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "student.json"]


def test_a_run_gives_a_model_with_the_labels_that_reads_with_the_tokenizer(
    world: World, tmp_path: Path
) -> None:
    run, recipe = world.params.runs["fc-kd-pool"], world.params.recipes["kd-pool"]
    run = run.model_copy(update={"seeds": (0,)})
    out = tmp_path / "out"
    train_run("x", run, entry(), recipe, world.run_paths(out), Workers(seeds_at_once=1))
    foreign = AutoModelForSequenceClassification.from_pretrained(out / "seed-0", local_files_only=True).eval()
    assert foreign.config.id2label == dict(enumerate(Cache.open(world.cache).labels))
    reader = AutoTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
    text = reader("good film", return_tensors="pt")
    with torch.inference_mode():
        own = load_student(out / "seed-0")(text["input_ids"], text["attention_mask"].bool())
        said = foreign(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
    assert torch.allclose(own, said, atol=1e-6)
    assert foreign.config.pad_token_id == reader.pad_token_id


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (entry("distilbertt"), "model_type 'distilbertt'; did you mean 'distilbert'?"),
        (entry(n_layer=2), "distilbert has no config key 'n_layer'; did you mean 'n_layers'?"),
        (entry("t5"), "reads a text and writes another"),
    ],
)
def test_what_transformers_does_not_know_is_refused_before_training_with_the_nearest_name(
    world: World, tmp_path: Path, chosen: TransformersStudent, said: str
) -> None:
    run, recipe = world.params.runs["fc-kd-pool"], world.params.recipes["kd-pool"]
    with pytest.raises(ConfigError) as refused:
        train_run("x", run, chosen, recipe, world.run_paths(tmp_path / "out"), Workers(seeds_at_once=1))
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit_are_refused_with_transformers_reason() -> None:
    with pytest.raises(ConfigError, match="distilbert"):
        build(entry(dim=15))


def test_fewer_positions_than_a_row_has_tokens_are_refused() -> None:
    short = entry(max_position_embeddings=8)
    with pytest.raises(ConfigError, match="cannot read 12 tokens"):
        check_padding(build(short), short, VOCAB)


def test_a_model_that_reads_padding_is_refused() -> None:
    chosen = entry("fnet", num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    torch.manual_seed(0)
    model = build(chosen)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.raises(ConfigError, match="depend on the padding"):
        check_padding(model, chosen, VOCAB)


def test_what_the_cache_decides_is_not_for_the_config_to_say() -> None:
    with pytest.raises(ValidationError, match="vocab_size follows from the cache"):
        entry(vocab_size=7)
