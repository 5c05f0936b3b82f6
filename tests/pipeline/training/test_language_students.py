"""Students of language models, from a cache of entries: what they see, what is lost, what is said of them."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.capture.verify import verify_cache
from pipeline.config.caches import Weights
from pipeline.config.params import Run, RunInputs, Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student
from pipeline.data.rows import load_rows
from pipeline.engines.loading import load_language_model
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.evaluation.sampled_lines import continue_prompts
from pipeline.losses.sparse import SparseTargets
from pipeline.objectives.language_model import TeacherReference, score_documents
from pipeline.runtime.files import write_json
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.model_inputs import call_model, for_transformers
from pipeline.students.llama import Llama
from pipeline.students.registry import build_student, load_student
from pipeline.teachers.record import teacher_reader
from pipeline.training.documents_workload import language_loss
from pipeline.training.job import Job
from pipeline.training.run import train_run, write_student_tokenizer
from pipeline.training.seed import train_seed
from storage import Cache
from storage.errors import ConfigError, SpecMismatch
from storage.writer import Store
from tests.pipeline.capture.test_language_caches import held
from tests.pipeline.prose import Prose

STUDENT = {"kind": "llama", "layers": 1, "width": 16, "heads": 2, "max_length": 9, "learning_rate": 1e-2}
RECIPE = {"alpha": 0.0, "epochs": 3, "batch_tokens": 64, "evaluations_per_epoch": 1, "precision": "float32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Prose:
    prose = Prose(tmp_path_factory.mktemp("students"))
    prose.make_teacher()
    prose.capture()
    write_json(prose.check(), prose.root / "verified.json")
    return prose


def student(**changes: Any) -> Student:
    entry: Student = TypeAdapter(Student).validate_python(STUDENT | changes)
    return entry


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(RECIPE | changes)


def documents(prose: Prose, *splits: str, max_length: int = 9) -> CachedDocuments:
    return CachedDocuments(Cache.open(prose.cache), load_rows(prose.dataset), splits, max_length)


def seen(stream: Any) -> Counter[tuple[Any, ...]]:
    """(tokens of a piece up to here, next token, its entries) of every target."""
    found: Counter[tuple[Any, ...]] = Counter()
    for batch in stream:
        entries: list[list[tuple[int, float]]] = [[] for _ in batch.labels_T]
        for position, id_, weight in zip(*(t.tolist() for t in batch.teacher[:3]), strict=True):
            entries[position].append((id_, weight))
        at = 0
        for ids, mask in zip(batch.inputs["input_ids"].tolist(), batch.mask, strict=True):
            assert mask.int().diff().le(0).all(), "padding stands behind"
            for place in range(int(mask.sum())):
                found[(*ids[: place + 1], int(batch.labels_T[at]), tuple(entries[at]))] += 1
                at += 1
        assert at == len(batch.labels_T)
    return found


def expected(prose: Prose, *splits: str, max_length: int) -> Counter[tuple[Any, ...]]:
    """The same from the rows themselves, one token at a time."""
    kept, rows = held(Cache.open(prose.cache)), load_rows(prose.dataset)
    found: Counter[tuple[Any, ...]] = Counter()
    for index in rows.select(*splits):
        row = kept[rows.row_ids[int(index)].as_py()]
        assert row.token_ids is not None
        tokens = row.token_ids.tolist()
        for place in range(len(tokens) - 1):
            own = slice(row.entries.offsets[place], row.entries.offsets[place + 1])
            pairs = zip(row.entries.ids[own].tolist(), row.entries.weights[own].tolist(), strict=True)
            first = place - place % max_length
            found[(*tokens[first : place + 1], tokens[place + 1], tuple(pairs))] += 1
    return found


@pytest.mark.parametrize("max_length", [1, 5, 9, 128])
def test_every_token_but_a_rows_last_is_a_target_once_with_its_label_and_entries(
    made: Prose, max_length: int
) -> None:
    some = documents(made, "train", max_length=max_length)
    wanted = expected(made, "train", max_length=max_length)
    assert some.num_targets == sum(wanted.values())
    for stream in (some.epoch(0, 0, 64), some.epoch(3, 1, 40), some.in_order(64)):
        assert seen(stream) == wanted


def test_the_order_is_a_function_of_seed_and_epoch_and_steps_are_known_beforehand(made: Prose) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return [batch.labels_T.tolist() for batch in documents(made, "train").epoch(seed, epoch, 48)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    some = documents(made, "train")
    assert some.num_steps(5, 3, 48) == sum(len(list(some.epoch(5, epoch, 48))) for epoch in range(3))
    assert all(batch.inputs["input_ids"].numel() <= 48 for batch in some.epoch(0, 0, 48))


def test_sorting_by_length_leaves_less_padding(made: Prose) -> None:
    sorted_, mixed = documents(made, "train", max_length=128).padding(0, 200)
    batches = list(documents(made, "train", max_length=128).epoch(0, 0, 200))
    assert sorted_ == pytest.approx(
        1 - sum(int(b.mask.sum()) for b in batches) / sum(b.inputs["input_ids"].numel() for b in batches)
    )
    assert sorted_ < mixed


def teacher_logits(prose: Prose, batch: DistillBatch) -> torch.Tensor:
    """What the live teacher says at every target of a batch of whole rows: [T, V]."""
    model = load_language_model(prose.teacher, "float32")
    with torch.inference_mode():
        logits: torch.Tensor = model(**for_transformers(batch.inputs)).logits
    return logits[batch.mask][:, : teacher_reader(prose.teacher).num_ids]


def untrained(prose: Prose) -> Llama:
    torch.manual_seed(1)
    model = build_student(student(max_length=128), teacher_reader(prose.teacher).num_ids, 0)
    assert isinstance(model, Llama)
    with torch.no_grad():
        model.head.mul_(20)
    return model


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_loss_from_a_top_k_cache_is_that_of_the_live_teacher(prose_topk: Prose, alpha: float) -> None:
    """All ids but one are kept: the bucket is one id, the loss the full one, up to the teacher's entropy."""
    batch = next(documents(prose_topk, "train", max_length=128).in_order(2000))
    model = untrained(prose_topk)
    told = teacher_logits(prose_topk, batch).softmax(-1)
    logits = call_model(model, batch.inputs)[batch.mask] @ model.head.T
    soft = -(told * logits.log_softmax(-1)).sum(-1).mean()
    hard = torch.nn.functional.cross_entropy(logits, batch.labels_T)
    ours = language_loss(model, batch, alpha, sampled=False)
    wanted = alpha * hard + (1 - alpha) * soft
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
    found, dense = (
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (ours, wanted)
    )
    for one, other in zip(found, dense, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max()) + 1e-7)


@pytest.fixture(scope="module")
def prose_topk(tmp_path_factory: pytest.TempPathFactory) -> Prose:
    prose = Prose(tmp_path_factory.mktemp("topk"))
    prose.make_teacher()
    targets = {"codec": "topk", "k": teacher_reader(prose.teacher).num_ids - 1, "layout": "plain"}
    prose.capture(**targets)
    write_json(prose.check(**targets), prose.root / "verified.json")
    return prose


@pytest.mark.parametrize("codec", ["threshold", "topk"])
def test_kl_agreement_loss_and_accuracy_are_those_of_the_live_teacher(
    made: Prose, prose_topk: Prose, codec: str
) -> None:
    prose = made if codec == "threshold" else prose_topk
    some = documents(prose, "train", "validation", "test", max_length=128)
    model = untrained(prose)
    teacher = TeacherReference(codec == "threshold", some.entropy())
    found = score_documents(model, some.in_order(256), teacher)
    loss, kl, right, agree, known = 0.0, 0.0, 0, 0, 0
    for batch in some.in_order(256):
        with torch.inference_mode():
            said = (call_model(model, batch.inputs)[batch.mask] @ model.head.T).log_softmax(-1)
        told = teacher_logits(prose, batch).log_softmax(-1)
        loss -= said.gather(1, batch.labels_T[:, None]).sum().item()
        kl += (told.exp() * (told - said)).sum().item()
        right += int((said.argmax(-1) == batch.labels_T).sum())
        assert isinstance(batch.teacher, SparseTargets)
        kept = batch.teacher.logits(said.shape[1])
        one = (kept == kept.amax(-1, keepdim=True)).sum(-1) == 1
        agree += int((one & (said.argmax(-1) == told.argmax(-1))).sum())
        known += int(one.sum())
    assert found.loss == pytest.approx(loss / some.num_targets, rel=1e-5)
    assert found.accuracy == pytest.approx(right / some.num_targets)
    assert found.kl_to_teacher == pytest.approx(kl / some.num_targets, rel=1e-4 if codec == "topk" else 0.03)
    assert found.agreement == pytest.approx(agree / known, abs=1e-9 if codec == "topk" else 0.01)


def train(prose: Prose, out: Path, entry: Student, how: Recipe, seed_list: list[int]) -> dict[str, Any]:
    run = Run.model_validate(
        {"dataset": "prose", "cache": "prose", "student": "s", "recipe": "r", "seeds": seed_list}
    )
    paths = RunInputs(prose.cache, prose.dataset, prose.root / "verified.json", out)
    return train_run("prose-run", run, entry, how, paths, Workers(seeds_at_once=None))


def test_a_run_trains_is_evaluated_and_says_how_it_was_run(made: Prose, tmp_path: Path) -> None:
    out = tmp_path / "run"
    record = train(made, out, student(), recipe(alpha=0.9, epochs=6, patience=9), [0, 1])
    for seed in record["seeds"]:
        losses = [point["validation_loss"] for point in seed["curve"]]
        assert min(losses) < losses[0]
        assert seed["best_loss"] == min(losses)
        assert seed["precision"] == "float32"
        assert seed["seconds_per_step"].keys() == {f"float32, {seed['threads']} threads"} | {
            "float32, 1 threads"
        }
        assert 0 <= seed["waiting"] < 1
        assert seed["targets_per_second"] > 0
        assert seed["padding"][0] <= seed["padding"][1]
        num_rows = documents(made, "train").num_rows
        assert seed["teacher_rows_seen"] == 6 * num_rows < seed["rows_seen"], "a long row is seen in pieces"
    run = Run(dataset="prose", cache="prose", student="s", recipe="r", seeds=(0, 1))
    paths = RunInputs(made.cache, made.dataset, made.root / "verified.json", out)
    row = evaluate_run("prose-run", run, student(), paths)
    assert row["perplexity"]["mean"] == pytest.approx(np.mean(np.exp(row["lm_loss"]["values"])))
    assert row["kl_to_teacher"]["mean"] > 0
    assert row["about"]["task"] == "causal-lm"
    assert len(row["about"]["lines"]) == 3
    assert all(line["begins"] for line in row["about"]["lines"])
    json.dumps(row, allow_nan=False)


def test_the_same_seed_gives_the_same_bits_and_transformers_loads_it(made: Prose, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kept = []
    for name in ("a", "b"):
        paths = RunInputs(made.cache, made.dataset, made.root / "verified.json", tmp_path / name)
        write_student_tokenizer(
            student(), Cache.open(made.cache), load_rows(made.dataset), paths.out / "tokenizer"
        )
        train_seed(Job(0, 1, student(), recipe(epochs=1), paths))
        kept.append((paths.out / "seed-0" / "model.safetensors").read_bytes())
    assert kept[0] == kept[1]
    ours, theirs = (
        load_student(tmp_path / "a" / "seed-0"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "seed-0"),
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        states = ours(ids)
        assert torch.allclose(states @ ours.head.T, theirs(ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("entry", "how", "error", "said"),
    [
        ({"kind": "fc", "embedding": 8, "hidden": 8}, {}, SpecMismatch, r"spec\.task +causal-lm"),
        (STUDENT | {"tokenizer": 300}, {}, ConfigError, "tokenizer of its own"),
        (STUDENT, {"temperature": 2.0}, SpecMismatch, "temperature"),
        (STUDENT, {"divergence": "reverse"}, SpecMismatch, "divergence"),
        (STUDENT, {"alpha": 1.0, "pool": True, "pseudo_labels": True}, ConfigError, "labels of its own"),
    ],
)
def test_what_cannot_learn_from_it_is_refused_before_the_first_step(
    made: Prose, tmp_path: Path, entry: dict[str, Any], how: dict[str, Any], error: type[Exception], said: str
) -> None:
    chosen: Student = TypeAdapter(Student).validate_python(entry)
    with pytest.raises(error, match=f"(?s){said}"):
        train(made, tmp_path / "run", chosen, recipe(**how), [0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("temperature", [2.0, [1.0, 2.0], {"schedule": "linear", "from": 1.0, "to": 2.0}])
def test_a_temperature_is_refused_for_top_k_entries_of_a_language_model_too(
    prose_topk: Prose, tmp_path: Path, temperature: Any
) -> None:
    with pytest.raises(SpecMismatch, match="has no temperature"):
        train(prose_topk, tmp_path / "run", student(), recipe(temperature=temperature), [0])


def test_lines_are_the_same_for_the_same_seed_and_end_where_asked() -> None:
    def likes_seven(ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(7), 50).float() * 9 + ids[0, -1] / 50

    first = continue_prompts(likes_seven, [[1, 2], [3]], 6, seed=0)
    assert first == continue_prompts(likes_seven, [[1, 2], [3]], 6, seed=0)
    assert [len(line) for line in first] == [6, 6]
    assert Counter(token for line in first for token in line)[7] > 9


def test_a_student_that_starts_from_all_of_its_teacher_is_its_teacher(made: Prose, tmp_path: Path) -> None:
    """Through a run, from the cache alone: the teacher's directory is gone when it trains."""
    own = Prose.copied(made.root, tmp_path / "own")
    entry = own.entry().model_copy(update={"weights": Weights(layers=(0, 1))})
    capture_cache(CaptureJob("prose", entry, own.dataset, own.teacher, own.cache, Store(own.root / "store")))
    record = verify_cache("prose", Cache.open(own.cache), entry, own.dataset, own.teacher)
    write_json(record, own.root / "verified.json")
    teacher = load_language_model(own.teacher, "float32")
    shutil.rmtree(own.teacher)
    start = {"layers": 2, "width": 16, "heads": 2, "inner": 24, "init": {"layers": [0, 1]}}
    train(own, tmp_path / "run", student(**start, learning_rate=1e-12), recipe(epochs=1), [0])
    model = load_student(tmp_path / "run" / "seed-0")
    batch = next(documents(own, "test").in_order(500))
    with torch.inference_mode():
        states = teacher.model(batch.inputs["input_ids"]).last_hidden_state[batch.mask]
        assert torch.allclose(call_model(model, batch.inputs)[batch.mask], states, atol=1e-4)
