"""Matching from a cache: the loss is that of a live teacher, and students are trained and chosen by it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from pipeline.config.caches import Hidden
from pipeline.config.match import Match
from pipeline.config.params import Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student, TinyBERTStudent
from pipeline.data.rows import POOL
from pipeline.data.tokenizer import TextReader
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import for_transformers
from pipeline.streaming.rows import CachedRows
from pipeline.students.registry import build_student
from pipeline.students.tinybert import TinyBERT
from pipeline.training.feature_matching import MatchedStudent
from pipeline.training.layer_maps import resolve_layers
from pipeline.training.run import train_run
from storage import Cache
from storage.errors import SpecMismatch
from tests import toy
from tests.pipeline.conftest import World

KEPT = {"layers": [0, 1, 2], "qkv": [1, 2], "pool": "none"}
BERT = TinyBERTStudent(kind="tinybert", layers=2, width=8, heads=2, max_length=32, learning_rate=3e-3)
PARTS: dict[str, dict[str, Any]] = {
    "states": {"states": {"map": "uniform"}},
    "cosine": {"states": {"map": [[2, 2]], "loss": "cosine", "weight": 2.0}},
    "embeddings": {"embeddings": {}},
    "attention": {"attention": {"heads": 2}},
    "relations": {"relations": {"heads": 4, "teacher_layer": 2}},
}


def kept(world: World, root: Path, **hidden: Any) -> World:
    """The toy project with a verified cache that keeps these states, of a teacher with large weights."""
    own = world.copy(root / "own")
    model = BertForSequenceClassification.from_pretrained(own.teacher)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and "LayerNorm" not in name:
                parameter.mul_(10)
    model.save_pretrained(own.root / "model")
    shutil.rmtree(own.teacher)
    own.make_teacher()
    entry = Hidden.model_validate(hidden)
    own.capture(hidden=entry)
    own.verified.write_text(f'{{"manifest": "{Cache.open(own.cache).manifest_sha256}"}}')
    return own


@pytest.fixture(scope="module")
def per_position(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return kept(world, tmp_path_factory.mktemp("positions"), **KEPT)


@pytest.fixture(scope="module")
def pooled(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return kept(world, tmp_path_factory.mktemp("pooled"), layers=[0, 1, 2], pool="first")


def first_batch(world: World, names: tuple[str, ...]) -> DistillBatch:
    rows = world.rows()
    reader = TextReader(world.teacher, 32, "error")
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    cached = CachedRows(Cache.open(world.cache), rows, tokens, reader.pad_id, ("train",), names)
    return next(iter(cached.in_order(16)))


def live(teacher: BertForSequenceClassification, batch: DistillBatch, pool: str) -> DistillBatch:
    """The same batch with what the teacher in memory thinks, by hand."""
    with torch.inference_mode():
        states = teacher(**for_transformers(batch.inputs), output_hidden_states=True).hidden_states
        hidden = {}
        for name in batch.hidden:
            kind, layer = name.split(".")
            if kind == "layer":
                vectors = states[int(layer)]
            else:
                part = teacher.bert.encoder.layer[int(layer) - 1].attention.self
                source = states[int(layer) - 1]
                vectors = torch.cat([part.query(source), part.key(source), part.value(source)], -1)
            if pool == "none":
                hidden[name] = vectors[batch.mask]
            elif pool == "first":
                hidden[name] = vectors[:, 0]
            else:
                lengths = batch.mask.sum(1)
                means = [row[:n].mean(0) for row, n in zip(vectors, lengths, strict=True)]
                hidden[name] = torch.stack(means)
    return batch._replace(hidden=hidden)


def dressed(world: World, match: Match, entry: TinyBERTStudent, model: Any = None) -> MatchedStudent:
    """A student of this entry, ready to be matched; random weights where no model is given."""
    hidden = Cache.open(world.cache).identity.spec.hidden
    assert hidden is not None
    torch.manual_seed(0)
    plan = resolve_layers("runs.x", match, entry, hidden)
    student = model or build_student(entry, 5 + len(toy.WORDS), 2)
    return MatchedStudent(student, match, plan, hidden).eval()


def both(world: World, match: Match, pool: str, entry: TinyBERTStudent = BERT, model: Any = None) -> Any:
    """The loss (from the cache, from the live teacher)."""
    own = dressed(world, match, entry, model)
    batch = first_batch(world, own._plan.names)
    teacher = BertForSequenceClassification.from_pretrained(world.teacher).eval()
    with torch.inference_mode():
        return [float(own.match(part).loss) for part in (batch, live(teacher, batch, pool))]


@pytest.mark.parametrize("part", PARTS)
def test_a_loss_from_the_cache_is_that_of_the_live_teacher(per_position: World, part: str) -> None:
    cached, alive = both(per_position, Match.model_validate(PARTS[part]), "none")
    assert cached == pytest.approx(alive, rel=2e-3)  # float16 states
    assert alive > 0.01


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_pooled_states_are_matched_with_a_student_pooled_alike(
    world: World, tmp_path: Path, pool: str
) -> None:
    own = kept(world, tmp_path, layers=[1, 2], pool=pool)
    for part in ("states", "cosine"):
        cached, alive = both(own, Match.model_validate(PARTS[part]), pool)
        assert cached == pytest.approx(alive, rel=2e-3)


def test_all_parts_together_are_their_weighted_sum(per_position: World) -> None:
    parts = [Match.model_validate(part) for name, part in PARTS.items() if name != "states"]
    merged = {key: value for name, part in PARTS.items() if name != "states" for key, value in part.items()}
    weighted = {key: {**value, "weight": 3.0} for key, value in merged.items()}
    own = {**BERT.model_dump(), "width": toy.WIDTH}
    entry = TinyBERTStudent.model_validate(own)
    unprojected = {"states": {"project": False}, "embeddings": {"project": False}}

    def loss(match: dict[str, Any]) -> float:
        plain = {key: {**value, **unprojected.get(key, {})} for key, value in match.items()}
        found: float = both(per_position, Match.model_validate(plain), "none", entry)[0]
        return found

    singles = [loss(part.model_dump(exclude_none=True, exclude={"prediction"})) for part in parts]
    cosine = PARTS["cosine"]["states"]["weight"]
    expected = 3 * (singles[0] / cosine + sum(singles[1:]))
    assert loss(weighted) == pytest.approx(expected, rel=1e-5)


def test_a_student_with_its_teachers_weights_has_nothing_to_learn(per_position: World) -> None:
    entry = BERT.model_copy(update={"width": toy.WIDTH})
    student = build_student(entry, 5 + len(toy.WORDS), 2)
    assert isinstance(student, TinyBERT)
    teacher = BertForSequenceClassification.from_pretrained(per_position.teacher)
    student.bert.config.intermediate_size = 32
    student.bert = teacher
    whole = {
        "states": {"project": False},
        "embeddings": {"project": False},
        "attention": {"heads": 2},
        "relations": {"heads": 8, "teacher_layer": 2},
    }
    loss = both(per_position, Match.model_validate(whole), "none", entry, student)[0]
    assert loss < 1e-5  # float16


def train(world: World, out: Path, recipe: dict[str, Any], student: Student = BERT) -> dict[str, Any]:
    run = world.params.runs["fc-ce"].model_copy(update={"seeds": (0,)})
    common = {"epochs": 3, "batch_rows": 16, "evaluations_per_epoch": 1}
    entry = Recipe.model_validate(common | recipe)
    record: dict[str, Any] = train_run(
        "x", run, student, entry, world.run_paths(out), Workers(seeds_at_once=1)
    )["seeds"][0]
    return record


def test_states_alone_on_the_pool_alone_are_learned_and_the_best_is_the_lowest_loss(
    per_position: World, tmp_path: Path
) -> None:
    merged = {key: value for part in PARTS.values() for key, value in part.items()}
    recipe = {"alpha": 1.0, "pool": "only", "epochs": 2, "match": {"prediction": 0.0, **merged}}
    record = train(per_position, tmp_path / "out", recipe)
    num = len(per_position.rows().select(POOL))
    assert record["rows_seen"] == record["teacher_rows_seen"] == 2 * num
    losses = [point["validation_loss"] for point in record["curve"]]
    assert losses[-1] < losses[0]
    assert record["best_loss"] == min(losses)
    saved = load_file(tmp_path / "out" / "seed-0" / "model.safetensors")
    assert set(saved) == set(build_student(BERT, 23, 2).state_dict())


def test_predictions_beside_states_are_chosen_by_accuracy(pooled: World, tmp_path: Path) -> None:
    recipe = {"alpha": 0.5, "temperature": 2.0, "match": {"prediction": 2.0, **PARTS["cosine"]}}
    record = train(pooled, tmp_path / "out", recipe)
    assert record["best_accuracy"] == max(point["validation_accuracy"] for point in record["curve"])
    assert record["teacher_rows_seen"] == record["rows_seen"] == 3 * len(pooled.rows().select("train"))


def test_the_projections_learn_too(per_position: World) -> None:
    own = dressed(per_position, Match.model_validate({**PARTS["states"], **PARTS["embeddings"]}), BERT)
    assert {name: tuple(p.weight.shape) for name, p in own.projections.items()} == {
        "states": (toy.WIDTH, 8),
        "embeddings": (toy.WIDTH, 8),
    }
    own.match(first_batch(per_position, own._plan.names)).loss.backward()
    assert all(p.weight.grad is not None and p.weight.grad.any() for p in own.projections.values())


def test_a_student_that_cuts_or_reads_otherwise_is_refused_before_the_first_step(
    per_position: World, pooled: World, tmp_path: Path
) -> None:
    recipe = {"match": PARTS["states"]}
    short = BERT.model_copy(update={"max_length": 6})
    with pytest.raises(SpecMismatch, match="a hidden state for each token"):
        train(per_position, tmp_path / "out", recipe, short)
    with pytest.raises(SpecMismatch, match=r"the cache does not fit the recipe of runs\.x"):
        train(pooled, tmp_path / "out", {"match": PARTS["attention"]})
    assert train(pooled, tmp_path / "out", recipe | {"epochs": 1}, short)["cut_rows"] > 0


def test_weights_that_are_schedules_have_their_value_of_the_step(per_position: World) -> None:
    parts = {**PARTS["attention"], **PARTS["relations"]}
    fades = {"schedule": "linear", "from": 4.0, "to": 0.0}
    rises = {"schedule": "wsd", "from": 0.0, "to": 2.0, "warmup": 0.5, "decay": 0.0}
    moving = {"attention": {**parts["attention"], "weight": fades}}
    moving |= {"relations": {**parts["relations"], "weight": rises}}

    def loss(match: dict[str, Any], done: float | None) -> float:
        own = dressed(per_position, Match.model_validate(match), BERT)
        with torch.inference_mode():
            return float(own.match(first_batch(per_position, own._plan.names), done).loss)

    attention, relations = (loss({name: part}, None) for name, part in parts.items())
    for done, (first, second) in {0.0: (4, 0), 0.25: (3, 1), 0.5: (2, 2), 1.0: (0, 2), None: (4, 2)}.items():
        assert loss(moving, done) == pytest.approx(first * attention + second * relations, rel=1e-5)


def test_predictions_that_come_in_later_count_at_their_step(per_position: World, tmp_path: Path) -> None:
    later = {"schedule": "linear", "from": 0.0, "to": 1.0}
    recipe = {"alpha": 0.5, "epochs": 2, "match": {"prediction": later, **PARTS["relations"]}}
    alone = {"alpha": 0.5, "epochs": 2, "match": {"prediction": 0.0, **PARTS["relations"]}}
    mixed, states = (train(per_position, tmp_path / name, r) for name, r in (("a", recipe), ("b", alone)))
    assert mixed["best_accuracy"] == max(point["validation_accuracy"] for point in mixed["curve"])
    extra = [a["train_loss"] - b["train_loss"] for a, b in zip(mixed["curve"], states["curve"], strict=True)]
    assert 0 < extra[0] < extra[1]  # the share of predictions grows: nothing at first, all at last
