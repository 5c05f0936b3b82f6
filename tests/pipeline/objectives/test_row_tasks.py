"""Images, several labels, numbers and vectors: from raw rows to results, as a live teacher would have it."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config.datasets import Dataset
from pipeline.config.params import Run
from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent, MLPStudent
from pipeline.config.teachers import Teacher
from pipeline.data.inputs import PixelReader, read_inputs
from pipeline.data.prepare import prepare_dataset
from pipeline.data.rows import Rows, load_rows
from pipeline.engines.engine import engine_inputs
from pipeline.engines.registry import engine_for
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.evaluation.teachers import evaluate_teacher
from pipeline.objectives import multilabel, regression
from pipeline.objectives.embedding import DISTANCES, vector_agreement
from pipeline.objectives.multilabel import binary_kl, label_quality
from pipeline.objectives.regression import value_quality
from pipeline.runtime.files import write_json
from pipeline.streaming.model_inputs import call_model
from pipeline.streaming.rows import CachedRows
from pipeline.students.registry import build_student
from pipeline.teachers.record import teacher_reader
from pipeline.training.checks import check_run
from pipeline.training.job import RECORD, Job
from pipeline.training.rows_workload import rows_workload
from pipeline.training.run import write_student_tokenizer
from pipeline.training.seed import train_seed
from pipeline.training.workload import TrainingData
from storage import Cache
from storage.errors import DataError, SpecMismatch, TeacherError
from storage.fingerprints import row_id
from tests.pipeline import row_worlds
from tests.pipeline.row_worlds import World

EMBEDDING = {"embedding": {"pool": "mean", "normalised": True}}
MAKERS: dict[str, Callable[[Path], World]] = {
    "images": row_worlds.images, "several": row_worlds.several, "numbers": row_worlds.numbers,
    "vectors": lambda root: row_worlds.vectors(root, **EMBEDDING),
}  # fmt: skip
FC = FCStudent(kind="fc", embedding=8, hidden=8)
MLP = MLPStudent(kind="mlp", hidden=(8,))
RECIPES = {
    "images": {"alpha": 0.5, "temperature": 2.0}, "several": {"alpha": 0.5, "temperature": 2.0},
    "numbers": {"alpha": 0.5, "divergence": "mse"}, "vectors": {"alpha": 0.0, "divergence": "cosine"},
}  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Finished projects that no test may change."""
    return {name: make(tmp_path_factory.mktemp(name)).all_of_it() for name, make in MAKERS.items()}


def recipe(name: str, **changes: Any) -> Recipe:
    body = {"epochs": 1, "batch_rows": 16, **RECIPES[name], **changes}
    return Recipe.model_validate(body)


def live(world: World, rows: Rows) -> torch.Tensor:
    """What the teacher in memory says of these rows."""
    reader = teacher_reader(world.teacher)
    spec = Cache.open(world.cache).identity.spec
    kept = engine_for(engine_inputs(world.teacher, spec, reader, rows)).answer(np.arange(len(rows.row_ids)))
    return torch.from_numpy(kept.kept.logits)


@pytest.mark.parametrize("name", MAKERS)
def test_the_loss_from_the_cache_is_that_with_the_teacher_in_memory(
    worlds: dict[str, World], name: str
) -> None:
    world = worlds[name]
    cache, rows = Cache.open(world.cache), load_rows(world.dataset)
    student = MLP if name == "images" else FC
    reader = PixelReader(16) if name == "images" else teacher_reader(world.teacher)
    lesson = rows_workload(student, recipe(name), TrainingData(cache, rows, reader), seed=0)
    torch.manual_seed(0)
    model = build_student(student, reader.num_ids, lesson.num_outputs).eval()
    cached = CachedRows(cache, rows, read_inputs(reader, rows), reader.pad_id, ("train",))
    batch = next(iter(cached.in_order(1000)))
    found = lesson.loss(model, batch, 0.0).item()
    again = live(world, rows)
    said = call_model(model, batch.inputs)
    order = [int(np.flatnonzero((again.numpy() == t).all(1))[0]) for t in batch.teacher.numpy()]
    truth = torch.from_numpy(rows.truth[order])
    expected = {
        "images": lambda: 0.5 * torch.nn.functional.cross_entropy(said, truth)
        + 0.5 * 4 * torch.nn.functional.kl_div(
            (said / 2).log_softmax(1), (again[order] / 2).softmax(1), reduction="batchmean"
        ),
        "several": lambda: 0.5 * torch.nn.functional.binary_cross_entropy_with_logits(said, truth)
        + 0.5 * binary_kl(said, again[order], 2.0),
        "numbers": lambda: 0.5 * (said - truth).square().mean() + 0.5 * (said - again[order]).square().mean(),
        "vectors": lambda: 1 - torch.cosine_similarity(said, again[order]).mean(),
    }[name]()  # fmt: skip
    assert found == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_every_task_goes_from_rows_to_results(worlds: dict[str, World], name: str, tmp_path: Path) -> None:
    world, student = worlds[name], MLP if name == "images" else FC
    cache = Cache.open(world.cache)
    assert cache.manifest.format_version == 4
    run = Run(dataset="toy", cache="toy", student="s", recipe="r")
    paths = world.paths(tmp_path / "model")
    check_run("run", cache, load_rows(world.dataset), student, recipe(name), paths.verified)
    write_student_tokenizer(student, cache, load_rows(world.dataset), paths.out / "tokenizer")
    done = train_seed(Job(0, 1, student, recipe(name), paths))
    body = {"seeds": [{"seed": 0, "seconds": done.fit.seconds}]}
    write_json(body, paths.out / RECORD)
    found = evaluate_run("run", run, student, paths)
    entry = Teacher.model_validate(world.teaching)
    ranked = {"images": "accuracy", "several": "macro_f1", "numbers": "rmse", "vectors": "cosine"}[name]
    assert math.isfinite(found[ranked]["mean"])
    taught = evaluate_teacher("tiny", entry, world.dataset, world.teacher)
    assert math.isfinite(taught[ranked]["mean"])
    if name == "vectors":
        assert taught["cosine"]["mean"] == pytest.approx(1, abs=1e-5)
        assert taught["nearest_10"]["mean"] == 1


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("vectors", {"divergence": "forward"}, "recipe.divergence"),
        ("vectors", {"alpha": 0.5}, "recipe.alpha"),
        ("vectors", {"temperature": 2.0}, "recipe.temperature"),
        ("numbers", {"temperature": 2.0}, "recipe.temperature"),
        ("numbers", {"divergence": "forward"}, "recipe.divergence"),
        ("numbers", {"temperature": [1.0, 2.0]}, "recipe.temperature"),  # every candidate is checked
        ("vectors", {"alpha": [0.0, 0.5]}, "recipe.alpha"),
        ("several", {"divergence": "jsd"}, "recipe.divergence"),
        ("images", {"divergence": "cosine"}, "recipe.divergence"),
        ("numbers", {"temperature": {"schedule": "linear", "from": 1.0, "to": 2.0}}, "recipe.temperature"),
        ("several", {"temperature": {"by": "confidence", "low": 1.0, "high": 2.0}}, "recipe.temperature"),
        ("vectors", {"alpha": {"schedule": "linear", "from": 0.0, "to": 0.5}}, "recipe.alpha"),
        ("several", {"alpha": 1.0, "pool": True, "pseudo_labels": True}, "recipe.pseudo_labels"),
    ],
)
def test_a_recipe_whose_loss_the_task_has_not_is_refused(
    worlds: dict[str, World], name: str, changes: dict[str, Any], field: str
) -> None:
    world = worlds[name]
    student = MLP if name == "images" else FC
    with pytest.raises(SpecMismatch, match=field):
        check_run(
            "run", Cache.open(world.cache), load_rows(world.dataset), student, recipe(name, **changes),
            world.root / "verified.json",
        )  # fmt: skip


def test_a_student_of_text_is_refused_for_images_and_one_of_images_for_text(worlds: dict[str, World]) -> None:
    for name, student in (("images", FC), ("numbers", MLP)):
        world = worlds[name]
        with pytest.raises(SpecMismatch, match=r"spec\.task"):
            check_run(
                "run", Cache.open(world.cache), load_rows(world.dataset), student, recipe(name),
                world.root / "verified.json",
            )  # fmt: skip


def test_other_pixels_or_weights_are_seen_by_verify(tmp_path: Path) -> None:
    world = row_worlds.images(tmp_path).all_of_it()
    path = world.dataset / "rows.parquet"
    table = pq.read_table(path)
    pixels = np.array(table["pixels"].combine_chunks().flatten())
    changed = pa.FixedSizeListArray.from_arrays(pa.array(255 - pixels), 16)
    pq.write_table(table.set_column(table.column_names.index("pixels"), "pixels", changed), path)
    with pytest.raises(SpecMismatch, match=r"row \w{32}: pixels"):
        world.check()


def test_columns_and_values_of_labels_say_the_same_as_lists_of_them(tmp_path: Path) -> None:
    found = []
    for place, columns in (
        ("lists", "topics"),
        ("columns", ["film", "plot", "good"]),
        ("values", {"good": {"good": 1}, "film": {"film": 1}, "plot": {"plot": 1}}),
    ):
        (tmp_path / place).mkdir()
        world = row_worlds.several(tmp_path / place, columns)
        summary = world.prepare()
        found.append((load_rows(world.dataset).values, summary["rows_per_label"]))
    for values, rows in found[1:]:
        assert (values == found[0][0]).all()
        assert rows == found[0][1]
    assert found[0][0].sum() > 0


def test_a_label_of_several_values_needs_them_all(tmp_path: Path) -> None:
    both = {"film": {"film": 1, "plot": 1}, "plot": {"plot": 1}, "good": {"good": 1}}
    world = row_worlds.several(tmp_path, both)
    world.prepare()
    values = load_rows(world.dataset).values
    raw = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = [[row["film"] & row["plot"], row["plot"], row["good"]] for row in raw]
    assert values.tolist() == expected
    assert 0 < values[:, 0].sum() < values[:, 1].sum()


def test_a_label_that_no_row_has_is_refused(tmp_path: Path) -> None:
    label = {"film": {"film": "1"}, "plot": {"plot": 1}, "good": {"good": 1}}
    world = row_worlds.several(tmp_path, label)
    with pytest.raises(DataError, match=r"label\.film: no row has {'film': '1'}\.\n  found film: 0, 1\nFix"):
        world.prepare()
    label["film"] = {"films": 1}
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="column 'films' is missing"):
        row_worlds.several(tmp_path / "other", label).prepare()


def test_values_of_labels_are_for_several_labels_and_for_each_of_them() -> None:
    entry = {"path": "rows.csv", "labels": ["good", "long"]}
    label = {"good": {"good": 1}, "long": {"long": 1}}
    with pytest.raises(ValueError, match="sequence-classification has a column of labels"):
        Dataset.model_validate({**entry, "columns": {"label": label}})
    entry["task"] = "multi-label-classification"
    Dataset.model_validate({**entry, "columns": {"label": label}})
    with pytest.raises(ValueError, match=r"columns\.label.*\.good\n.*at least 1 item"):
        Dataset.model_validate({**entry, "columns": {"label": label | {"good": {}}}})
    del label["long"]
    with pytest.raises(ValueError, match=r"found \['good'\], expected one for each of labels"):
        Dataset.model_validate({**entry, "columns": {"label": label}})


@pytest.mark.parametrize("value", ["film", [2, 0, 0]])
def test_labels_that_are_no_list_and_no_0_or_1_are_refused(tmp_path: Path, value: Any) -> None:
    world = row_worlds.several(tmp_path, ["film", "plot", "good"] if isinstance(value, list) else "topics")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    if isinstance(value, list):
        row["film"] = 2
    else:
        lines = [json.dumps({**json.loads(line), "topics": "film"}) for line in lines]
        row["topics"] = "film"
    lines[3] = json.dumps(row)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="row"):
        world.prepare()


def test_a_number_that_is_missing_is_refused(tmp_path: Path) -> None:
    world = row_worlds.numbers(tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[5] = json.dumps({**json.loads(lines[5]), "length": None})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="row 5 has"):
        world.prepare()


def test_images_of_files_and_of_columns_are_the_same_rows(tmp_path: Path) -> None:
    from PIL import Image

    world = row_worlds.images(tmp_path)
    world.prepare()
    first = load_rows(world.dataset)
    for row in range(len(first.row_ids)):
        folder = tmp_path / "folder" / ("lower", "upper")[first.labels[row]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(first.pixels[row].reshape(4, 4)).save(folder / f"{row:03}.png")
    body = {"path": str(tmp_path / "folder"), "format": "imagefolder", "labels": ["lower", "upper"]}
    body |= {"task": "image-classification", "images": {"shape": [4, 4, 1]}, "split": row_worlds.SPLIT}
    prepare_dataset("toy", Dataset.model_validate(body), tmp_path / "again")
    second = load_rows(tmp_path / "again")
    assert sorted(second.row_ids.to_pylist()) == sorted(first.row_ids.to_pylist())
    assert dict(zip(second.row_ids.to_pylist(), second.labels, strict=True)) == dict(
        zip(first.row_ids.to_pylist(), first.labels, strict=True)
    )
    digest = hashlib.sha256(first.pixels[0].tobytes()).hexdigest()
    assert first.row_ids[0].as_py() == row_id("toy", f"4x4x1:{digest}"), "the law of docs/cache-format.md"


@pytest.mark.parametrize("shape", [[4, 5, 1], [3, 4, 1]])
def test_images_of_another_size_than_the_columns_are_refused(tmp_path: Path, shape: list[int]) -> None:
    world = row_worlds.images(tmp_path)
    world.entry = world.entry.model_copy(
        update={"images": world.entry.images.model_copy(update={"shape": shape})}
    )
    with pytest.raises(DataError, match="16 columns of pixels"):
        world.prepare()


def test_a_vit_of_transformers_reads_images_as_its_preprocessor_says(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    world = row_worlds.images(tmp_path)
    world.prepare()
    torch.manual_seed(0)
    names = {0: "lower", 1: "upper"}
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=4,
            patch_size=2, num_channels=1, id2label=names, label2id={n: i for i, n in names.items()},
        )
    ).eval()  # fmt: skip
    vit.save_pretrained(tmp_path / "vit")
    steps = {"image_mean": [0.5], "image_std": [0.25]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(steps))
    world.make_teacher(model=str(tmp_path / "vit"), train=None)
    world.capture()
    rows = load_rows(world.dataset)
    images = (torch.tensor(rows.pixels).float().view(-1, 1, 4, 4) / 255 - 0.5) / 0.25
    held = pq.read_table(world.cache / "logits").to_pandas().set_index("row_id").loc[rows.row_ids.to_pylist()]
    with torch.inference_mode():
        expected = vit(pixel_values=images).logits.numpy()
    assert np.stack(held["logits"].to_list()) == pytest.approx(expected, abs=1e-5)


def test_vectors_are_made_as_sentence_transformers_files_say(tmp_path: Path) -> None:
    world = row_worlds.vectors(tmp_path)
    world.prepare()
    with pytest.raises(TeacherError, match=r"modules\.json"):
        world.make_teacher()
    steps = [{"path": p, "type": f"sentence_transformers.models.{t}"} for p, t in
             (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))]  # fmt: skip
    (tmp_path / "model" / "modules.json").write_text(json.dumps(steps))
    (tmp_path / "model" / "1_Pooling").mkdir()
    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert world.make_teacher()["embedding"] == {"width": 16, "pool": "first", "normalised": True}
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(TeacherError, match="pooling_mode_max_tokens"):
        world.make_teacher()
    steps[2]["type"] = "sentence_transformers.models.Dense"
    (tmp_path / "model" / "modules.json").write_text(json.dumps(steps))
    with pytest.raises(TeacherError, match=r"the steps \['Transformer', 'Pooling', 'Dense'\]"):
        world.make_teacher()


def test_cached_vectors_are_means_over_true_tokens(worlds: dict[str, World]) -> None:
    from transformers import AutoModel, AutoTokenizer

    world = worlds["vectors"]
    rows = load_rows(world.dataset)
    tokenizer = AutoTokenizer.from_pretrained(world.root / "model")
    model = AutoModel.from_pretrained(world.root / "model").eval()
    held = pq.read_table(world.cache / "logits").to_pandas().set_index("row_id")["embedding"]
    for row in range(5):
        with torch.inference_mode():
            states = model(**tokenizer(rows.texts[row].as_py(), return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
        assert held[rows.row_ids[row].as_py()] == pytest.approx(expected, abs=1e-5)


def test_closed_cases_of_the_losses() -> None:
    logit = math.log(0.9 / 0.1)
    said, wanted = torch.tensor([[math.log(0.8 / 0.2)]]), torch.tensor([[logit]])
    assert binary_kl(said, wanted).item() == pytest.approx(0.0367, abs=1e-4)
    assert binary_kl(wanted, wanted, 3.0).item() == pytest.approx(0, abs=1e-7)
    both = torch.tensor([[0.3, -1.2]]), torch.tensor([[1.0, 0.5]])
    halved = binary_kl(both[0] / 2, both[1] / 2)
    assert binary_kl(*both, 2.0).item() == pytest.approx(4 * halved.item(), rel=1e-5)
    unlabelled = torch.tensor([[1.0, 0.0], [math.nan, math.nan]])
    logits = torch.zeros(2, 2, requires_grad=True)
    assert multilabel.label_loss(logits, unlabelled).item() == pytest.approx(math.log(2))
    loss = regression.label_loss(logits, torch.full((2, 2), math.nan))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    right = torch.tensor([[1.0, 0.0]])
    assert DISTANCES["cosine"](right, torch.tensor([[0.0, 2.0]])).item() == pytest.approx(1)
    assert DISTANCES["cosine"](right, 5 * right).item() == pytest.approx(0, abs=1e-6)
    assert DISTANCES["mse"](right, 5 * right).item() == pytest.approx(8)


def test_closed_cases_of_the_metrics() -> None:
    truth = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)
    found = label_quality(np.where(truth > 0, 2, -2).astype(np.float32), truth)
    assert found == {"macro_f1": 1, "micro_f1": 1, "roc_auc": 1, "exact_match": 1}
    line = np.array([[1.0], [2.0], [4.0]], np.float32)
    found = value_quality(line + 1, line)
    assert (found["rmse"], found["mae"]) == (1, 1)
    assert found["pearson"] == pytest.approx(1)
    assert found["r2"] == pytest.approx(1 - 3 / (14 / 3))
    assert value_quality(line**3, line)["spearman"] == pytest.approx(1)
    assert value_quality(line, np.ones_like(line))["r2"] is None
    vectors = np.eye(3, dtype=np.float32) + 0.1 * np.arange(9, dtype=np.float32).reshape(3, 3)
    assert vector_agreement(2 * vectors, vectors, None)["nearest"] == 1


@pytest.mark.parametrize(("name", "field"), [("images", "image"), ("vectors", "embedding")])
def test_a_spec_has_the_fields_of_its_task_alone(worlds: dict[str, World], name: str, field: str) -> None:
    own = Cache.open(worlds[name].cache).identity.spec
    other = Cache.open(worlds["numbers"].cache).identity.spec
    for body in ({**dict(own), field: None}, {**dict(other), field: getattr(own, field)}):
        with pytest.raises(ValueError, match=f"(needs a|has no) field {field}"):
            type(own).model_validate(body)
