"""Views of training rows: functions of seed, text and number alone, each with a target of its own."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.augment.substitutes import Masked, Neighbours, Request, _batches, best_first, with_core
from pipeline.augment.views import augment_dataset, make_views
from pipeline.config.datasets import Augmented
from pipeline.config.params import Workers
from pipeline.config.recipes import Recipe
from pipeline.data.rows import NO_LABEL, VIEWS, Rows, load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.engines.loading import load_classifier, load_language_model
from pipeline.objectives.base import SoftLossSettings
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.streaming.model_inputs import call_model, for_transformers
from pipeline.students.registry import build_student
from pipeline.teachers.record import teacher_reader
from pipeline.training.rows_workload import rows_workload
from pipeline.training.run import train_run
from pipeline.training.workload import TrainingData, training_splits
from storage import Cache
from storage.errors import AssetError, DataError, SpecMismatch, TeacherError
from storage.fingerprints import row_id
from tests import toy
from tests.pipeline import encoders
from tests.pipeline.capture.test_capture import change_json
from tests.pipeline.conftest import World

TEXTS = toy.texts(40, seed=3)


def entry(**changes: Any) -> Augmented:
    return Augmented.model_validate({"dataset": "toy", "model": "model", "replace": 0.0} | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "bert"
    toy.write_model(directory)
    return directory


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("masked") / "bert"
    encoders.write(directory, "masked-lm")
    return directory


@pytest.mark.parametrize("kind", ["embeddings", "mlm"])
def test_a_view_depends_on_seed_text_and_number_alone(model: Path, masked: Path, kind: str) -> None:
    others = Neighbours(model, 5) if kind == "embeddings" else Masked(masked, 5)
    chosen = entry(replace=0.4, swap=0.2, words=kind)
    views = make_views(TEXTS, chosen, 1, others)
    assert make_views(TEXTS[::-1], chosen, 1, others)[::-1] == views
    assert [make_views([text], chosen, 1, others)[0] for text in TEXTS[:9]] == views[:9]
    assert make_views(TEXTS, chosen, 2, others) != views
    assert make_views(TEXTS, chosen.model_copy(update={"seed": 1}), 1, others) != views


def test_a_view_that_was_made_once_is_made_for_ever() -> None:
    text = "the film is slow , but the ending is warm and the music sharp"
    found = [make_views([text], entry(delete=0.2, swap=0.2), number, None)[0] for number in (1, 2)]
    assert found == [
        "film sharp slow , but ending warm the music is",
        "film the is the , but sharp ending warm slow music the",
    ]


def test_words_are_left_out_by_chance_and_one_stays() -> None:
    views = make_views(TEXTS, entry(delete=0.3), 1, None)
    kept = sum(len(view.split()) for view in views) / sum(len(text.split()) for text in TEXTS)
    assert kept == pytest.approx(0.7, abs=0.06)
    for text, view in zip(TEXTS, views, strict=True):
        words = iter(text.split())
        assert all(word in words for word in view.split())  # in their order
    assert all(len(view.split()) == 1 for view in make_views(TEXTS, entry(delete=1.0), 1, None))


def test_words_that_change_places_stay_the_same_words() -> None:
    views = make_views(TEXTS, entry(delete=0.0, swap=0.5), 1, None)
    assert [Counter(view.split()) for view in views] == [Counter(text.split()) for text in TEXTS]
    assert views != TEXTS


def test_a_new_word_stands_in_the_punctuation_of_the_old_and_takes_its_capital(model: Path) -> None:
    text = '("Good film, dull-ish plot.")'
    found = make_views([text], entry(replace=1.0, delete=0.0), 1, Neighbours(model, 3))[0].split()
    assert found[0][:2] == '("'
    assert found[0][2].isupper()
    assert found[1][-1] == ","
    assert found[2] == "dull-ish"  # no whole word of the vocabulary
    assert found[3][-3:] == '.")'
    assert not {"good", "film", "plot"} & {word.strip('().,"').lower() for word in found}
    assert with_core("--", "x") == "--x"


@pytest.mark.parametrize("kind", ["embeddings", "mlm"])
def test_what_is_no_word_is_not_exchanged(model: Path, masked: Path, kind: str) -> None:
    others = Neighbours(model, 5) if kind == "embeddings" else Masked(masked, 5)
    made = make_views(["film , plot -- !"], entry(replace=1.0, delete=0.0, words=kind), 1, others)
    assert [made[0].split()[place] for place in (1, 3, 4)] == [",", "--", "!"]


def test_texts_are_read_in_batches_of_like_length_and_bounded_size() -> None:
    lengths = np.array([5, 4096, 7, 512, 1, 512, 512, 512, 512])
    parts = _batches(lengths)
    assert [part.tolist() for part in parts] == [[1], [3, 5, 6, 7], [8, 2, 0, 4]]


def test_neighbours_are_those_of_the_largest_cosine_and_never_the_word_itself(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    words_VD = tensors["bert.embeddings.word_embeddings.weight"].double()
    unit = torch.nn.functional.normalize(words_VD, dim=1)
    vocabulary = TextReader(model, 32, "error").tokenizer.get_vocab()
    found = Neighbours(model, 4)([Request(["Film", "plot!", "nonsense"], [0, 1, 2])])[0]
    for word, own in zip(("film", "plot"), found, strict=False):
        scores = {other: float(unit[vocabulary[word]] @ unit[vocabulary[other]]) for other in toy.WORDS}
        del scores[word]
        assert own == sorted(scores, key=lambda other: -scores[other])[:4]
    assert found[2] == []
    assert len(Neighbours(model, 99)([Request(["film"], [0])])[0][0]) == len(toy.WORDS) - 1


def test_scores_that_differ_by_rounding_alone_give_the_same_words_in_the_order_of_ids() -> None:
    scores = np.array([0.25, 0.5, 0.25, 0.5, 0.75, 0.5])
    nobody = np.zeros(6, np.bool_)
    for noise in np.random.default_rng(0).normal(0, 1e-9, (20, 6)):
        for num, best in ((2, [4, 1]), (3, [4, 1, 3]), (5, [4, 1, 3, 5, 0]), (9, [4, 1, 3, 5, 0, 2])):
            assert best_first(scores + noise, nobody, num).tolist() == best
    assert best_first(scores, np.arange(6) == 1, 2).tolist() == [4, 3]


def test_a_masked_model_is_asked_about_the_places_alone_and_offers_what_it_expects(masked: Path) -> None:
    words = [text.split() for text in TEXTS]
    requests = [Request(own, [0, len(own) - 1]) for own in words]
    asked = Masked(masked, 3)
    together = asked(requests)
    assert [asked([request])[0] for request in requests] == together
    live = load_language_model(masked, "float32", "AutoModelForMaskedLM")
    reader = TextReader(masked, 32, "error")
    mask = reader.special["mask_token"]
    ids = reader.read([" ".join(["[MASK]", *words[0][1:-1], "[MASK]"])], ["x"]).ids
    masked_logits = live(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0][ids == mask]
    for place, logits, found in zip((0, -1), masked_logits, together[0], strict=True):
        vocabulary = reader.tokenizer.get_vocab()
        whole = [word for word in toy.WORDS if word in vocabulary and word != words[0][place]]
        assert found == sorted(whole, key=lambda word: -logits[vocabulary[word]])[:3]


def test_words_past_the_models_positions_and_masks_that_a_text_brings_are_left_alone(masked: Path) -> None:
    found = Masked(masked, 2)([Request(["film", "[MASK]", "plot", *["film"] * encoders.MOST], [2, 34])])
    assert len(found[0][0]) == 2
    assert found[0][1] == []


def test_a_model_without_what_is_needed_is_refused(model: Path, masked: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"its weights lack (.|\n)*Or write words: embeddings"):
        Masked(model, 3)
    shutil.copytree(masked, tmp_path / "masked")
    change_json(tmp_path / "masked" / "tokenizer_config.json", mask_token=None)
    with pytest.raises(TeacherError, match="no mask token"):
        Masked(tmp_path / "masked", 3)
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["bert.embeddings.word_embeddings.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="lack the input embeddings"):
        Neighbours(tmp_path / "model", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replace": 0.6, "delete": 0.5}, "sum to more than 1"),
        ({"delete": 0.0}, "views would equal their rows"),
        ({"views": 256}, "less than or equal to 255"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        entry(**changes)


class Own(World):
    """A world with an augmented dataset next to its own."""

    @property
    def augmented(self) -> Path:
        return self.root / "augmented"

    def augment(self, **changes: Any) -> dict[str, Any]:
        chosen = entry(**{"model": str(self.root / "model"), "views": 2, "replace": 0.3, **changes})
        return augment_dataset("more", chosen, self.dataset, self.augmented)

    def seal(self) -> int:
        """Capture the augmented rows; how many the teacher was asked about."""
        own = World(self.root)
        shutil.rmtree(self.root / "plain", ignore_errors=True)
        self.dataset.rename(self.root / "plain")
        shutil.copytree(self.augmented, self.dataset)
        computed = own.capture(hidden=None).computed_rows
        self.verified.write_text(json.dumps({"manifest": Cache.open(self.cache).manifest_sha256}))
        return computed


@pytest.fixture
def own(world: World, tmp_path: Path) -> Own:
    return Own(world.copy(tmp_path / "own").root)


def test_the_rows_stay_as_they_are_and_views_of_training_rows_stand_behind(own: Own) -> None:
    plain, summary = own.rows(), own.augment()
    found = load_rows(own.augmented)
    assert found.views is not None
    rows = found.with_views(0, False)
    for part in ("row_ids", "texts"):
        assert getattr(rows, part).equals(getattr(plain, part))
    assert (rows.splits == plain.splits).all()
    assert (rows.labels == plain.labels).all()
    assert plain.views is None
    assert "view" not in pq.read_schema(own.dataset / "rows.parquet").names
    views = found.only(VIEWS)
    assert set(np.unique(views.views)) == {1, 2}
    assert views.row_ids.to_pylist() == [row_id("toy/views", text) for text in views.texts.to_pylist()]
    assert summary["rows"] == Counter(found.splits.tolist())
    assert sum(summary["views"].values()) + sum(summary["views_left_out"].values()) == 2 * len(
        plain.select("train")
    )
    by_text = dict(zip(plain.texts.to_pylist(), plain.labels.tolist(), strict=True))
    train = plain.texts.take(plain.select("train")).to_pylist()
    made = make_views(train, entry(replace=0.3), 2, Neighbours(own.root / "model", 10))
    of_view = {view: by_text[text] for text, view in zip(train, made, strict=True)}
    for text, label, number in zip(views.texts.to_pylist(), views.labels, views.views, strict=True):
        if number == 2:
            assert of_view[text] == label
    before = (own.augmented / "rows.parquet").read_bytes()
    own.augment()
    assert (own.augmented / "rows.parquet").read_bytes() == before


def test_no_view_says_what_its_row_or_a_held_out_row_says(own: Own) -> None:
    table = pq.read_table(own.dataset / "rows.parquet")
    texts, splits = table.column("text").to_pylist(), table.column("split").to_pylist()
    train, test = splits.index("train"), splits.index("test")
    view = make_views([texts[train]], entry(delete=0.4), 1, None)[0]
    assert view != texts[train]
    texts[test] = view.replace(" ", "  ")
    changed = table.set_column(1, "text", [texts])
    pq.write_table(changed, own.dataset / "rows.parquet")
    summary = own.augment(replace=0.0, delete=0.4, views=1)
    assert summary["views_left_out"]["says what a held-out row says"] >= 1
    views = load_rows(own.augmented).only(VIEWS).texts.to_pylist()
    assert view not in views
    few = own.augment(replace=0.0, delete=0.01, views=3)
    assert few["views_left_out"]["says what its row or an earlier view says"] > 100


def test_only_views_are_asked_about_and_each_has_the_target_that_the_teacher_gives_it(own: Own) -> None:
    own.capture(hidden=None)
    own.augment()
    rows = load_rows(own.augmented)
    assert own.seal() == len(set(rows.only(VIEWS).row_ids.to_pylist()))
    recipe = Recipe(alpha=0.3, temperature=2.0, views=2)
    reader = teacher_reader(own.teacher)
    taught = rows.with_views(2, False).only("validation", *training_splits(recipe))
    student = own.params.students["fc"]
    lesson = rows_workload(student, recipe, TrainingData(Cache.open(own.cache), taught, reader), 0)
    model = build_student(student, reader.num_ids, 2).eval()
    live = load_classifier(own.teacher)
    without_labels = 0
    for batch in lesson.batches(0):
        logits = live(**for_transformers(batch.inputs)).logits.detach()
        assert isinstance(batch.teacher, torch.Tensor)
        assert torch.allclose(batch.teacher, logits, atol=1e-5)
        student = call_model(model, batch.inputs)
        truth = CLASSIFICATION.mixed_loss(student, batch.labels_T, logits, 0.3, SoftLossSettings(2.0))
        assert torch.allclose(lesson.loss(model, batch, 0.0), truth, atol=1e-5)
        without_labels += int((batch.labels_T == NO_LABEL).sum())
    assert without_labels == len(rows.select(VIEWS))


def test_a_recipe_takes_so_many_views_with_labels_or_without(own: Own, tmp_path: Path) -> None:
    own.augment()
    own.seal()
    rows = load_rows(own.augmented)
    assert rows.views is not None
    train, first = len(rows.select("train")), int((rows.views == 1).sum())
    run, student = own.params.runs["fc-ce"], own.params.students["fc"]

    def seen(**recipe: Any) -> int:
        chosen = Recipe.model_validate({"epochs": 1, **recipe})
        paths = own.run_paths(tmp_path / "out")
        record = train_run(
            "x", run.model_copy(update={"seeds": (0,)}), student, chosen, paths, Workers(seeds_at_once=1)
        )
        found: int = record["seeds"][0]["rows_seen"]
        return found

    assert seen() == train
    assert seen(views=1) == train + first
    assert seen(views=2, alpha=1.0, view_labels=True) == train + len(rows.select(VIEWS))
    with pytest.raises(DataError, match=r"trains on 3 views of each training row, and the dataset has 2"):
        seen(views=3)
    shutil.rmtree(own.dataset)
    (own.root / "plain").rename(own.dataset)
    with pytest.raises(DataError, match="the dataset has 0"):
        seen(views=1)


def test_a_cache_without_the_views_is_refused(own: Own, tmp_path: Path) -> None:
    own.augment()
    shutil.copytree(own.augmented, own.dataset, dirs_exist_ok=True)
    run, student = own.params.runs["fc-ce"], own.params.students["fc"]
    with pytest.raises(SpecMismatch, match=r"does not fit runs\.x"):
        train_run(
            "x",
            run,
            student,
            Recipe(views=1, epochs=1),
            own.run_paths(tmp_path / "out"),
            Workers(seeds_at_once=1),
        )


def test_labels_of_views_are_the_rows_or_none() -> None:
    names = pa.array(["x", "y", "z"])
    labels, splits = np.array([0, 1, 1], np.int32), np.array(["train", VIEWS, VIEWS])
    rows = Rows(names, names, labels, splits, ("a", "b"), views=np.array([0, 1, 2], np.int32))
    assert rows.with_views(2, True).labels.tolist() == [0, 1, 1]
    assert rows.with_views(1, False).labels.tolist() == [0, NO_LABEL]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"views": 1, "alpha": 1.0}, "views have none"),
        ({"view_labels": True}, "view_labels needs views"),
    ],
)
def test_recipes_that_would_learn_nothing_from_views_are_refused(
    recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(recipe)


def test_rows_of_another_task_and_a_missing_model_are_refused(own: Own, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"not a directory with a config\.json"):
        own.augment(model=str(tmp_path / "nowhere"))
    words = encoders.Project.start(tmp_path, "token-classification")
    with pytest.raises(DataError, match="the task of toy is token-classification"):
        augment_dataset("more", entry(), words.dataset, tmp_path / "out")
