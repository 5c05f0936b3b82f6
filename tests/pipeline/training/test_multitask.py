"""Several tasks, one student: its loss, its order, its answers, its record, and what is refused."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, linear

from pipeline.config.params import Export, Multitask, TaskRun, Workers
from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent
from pipeline.data.rows import POOL, load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.export.export_run import export_run
from pipeline.export.predictor import Predictor
from pipeline.report.build import build_report
from pipeline.runtime.files import write_json
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.model_inputs import call_model
from pipeline.streaming.verified import open_inputs
from pipeline.students.base import TaskHead
from pipeline.students.fc import FC
from pipeline.students.registry import build_student, load_student
from pipeline.teachers.record import teacher_reader
from pipeline.training.job import Job, TaskPart
from pipeline.training.multitask import ROUND, MultitaskWorkload, TaskBatches
from pipeline.training.multitask_run import train_multitask
from pipeline.training.rows_workload import rows_workload
from pipeline.training.run import train_run, write_student_tokenizer
from pipeline.training.seed import train_seed
from pipeline.training.selection import best_seed
from pipeline.training.workload import TrainingData
from storage import Cache
from storage.errors import AssetError, DataError, SpecMismatch
from tests.pipeline import row_worlds
from tests.pipeline.conftest import World

STUDENT = FCStudent(kind="fc", embedding=8, hidden=8)
BODIES: dict[str, dict[str, Any]] = {
    "mood": {"alpha": 0.5, "temperature": 2.0, "epochs": 2, "batch_rows": 16, "pool": True},
    "sense": {"alpha": 0.0, "divergence": "cosine", "epochs": 2, "batch_rows": 16},
}
WEIGHTS = {"mood": 3.0, "sense": 1.0}
EMBEDDING = {"embedding": {"pool": "mean", "normalised": True}}
SPANS = {"mood": (0, 2), "sense": (2, 18)}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> row_worlds.World:
    return row_worlds.vectors(tmp_path_factory.mktemp("vectors"), **EMBEDDING).all_of_it()


def recipe(task: str, **changes: Any) -> Recipe:
    return Recipe.model_validate({**BODIES[task], **changes})


def both(world: World, vectors: row_worlds.World, out: Path) -> dict[str, TaskPart]:
    """Labels and logits of the reviews, and vectors of other texts, for a student in `out`."""
    paths = {"mood": world.run_paths(out), "sense": vectors.paths(out)}
    return {t: TaskPart(recipe(t), paths[t]._replace(task=t), WEIGHTS[t]) for t in paths}


@pytest.fixture
def parts(world: World, vectors: row_worlds.World) -> dict[str, TaskPart]:
    """The same, for a student that each test puts somewhere else."""
    return both(world, vectors, Path("model"))


def written(parts: dict[str, TaskPart], out: Path) -> dict[str, TaskPart]:
    """The same tasks, their student in `out`."""
    return {task: part._replace(paths=part.paths._replace(out=out)) for task, part in parts.items()}


def train(parts: dict[str, TaskPart], out: Path, student: Any = STUDENT, **entry: Any) -> dict[str, Any]:
    weights = {task: part.weight for task, part in parts.items()}
    whole = Multitask(student="fc", weights=weights, **entry)
    return train_multitask("both", whole, student, written(parts, out), Workers(seeds_at_once=2), out)


class Learned:
    """The lessons of both tasks, and a student that has learned nothing yet."""

    def __init__(self, world: World, parts: dict[str, TaskPart], **recipes: Recipe) -> None:
        reader = teacher_reader(world.teacher)
        self.lessons = {}
        for task, part in parts.items():
            cache, rows = open_inputs(part.paths)
            own = recipes.get(task, part.recipe)
            self.lessons[task] = rows_workload(STUDENT, own, TrainingData(cache, rows, reader), seed=0)
        self.joined = MultitaskWorkload(self.lessons, WEIGHTS)
        torch.manual_seed(0)
        built = build_student(STUDENT, reader.num_ids, self.joined.workload.num_outputs)
        assert isinstance(built, FC)
        self.model = built.eval()

    def step(self) -> TaskBatches:
        return next(iter(self.joined.workload.batches(0)))


@pytest.fixture
def learned(world: World, parts: dict[str, TaskPart]) -> Learned:
    return Learned(world, parts)


def by_hand(model: torch.nn.Module, step: TaskBatches) -> dict[str, torch.Tensor]:
    """The losses of both recipes, written out."""
    mood, sense = step.parts
    said = call_model(model, mood.inputs)[:, :2]
    labelled = mood.labels_T >= 0
    teacher = (mood.teacher / 2).softmax(1)
    soft = 4 * kl_div((said / 2).log_softmax(1), teacher, reduction="batchmean")
    hard = cross_entropy(said[labelled], mood.labels_T[labelled])
    vectors = call_model(model, sense.inputs)[:, 2:]
    return {
        "mood": 0.5 * hard + 0.5 * soft,
        "sense": (1 - cosine_similarity(vectors, sense.teacher)).mean(),
    }


def test_the_loss_of_a_step_is_the_weighted_mean_of_the_tasks_losses(learned: Learned) -> None:
    step = learned.step()
    found = learned.joined.workload.loss(learned.model, step, 0.0)
    losses = by_hand(learned.model, step)
    assert found.item() == pytest.approx((3 * losses["mood"] + 1 * losses["sense"]).item() / 4, abs=1e-6)
    for task, part in zip(SPANS, step.parts, strict=True):
        alone = learned.lessons[task].loss(TaskHead(learned.model, SPANS[task]), part, 0.0)
        assert alone.item() == pytest.approx(losses[task].item(), abs=1e-6)


def test_outputs_side_by_side_are_a_head_for_each_task_on_what_they_share(learned: Learned) -> None:
    step, model = learned.step(), learned.model
    assert learned.joined.heads == SPANS
    last = model.head[-1]
    assert isinstance(last, torch.nn.Linear)
    shared: list[torch.Tensor] = []
    hook = last.register_forward_hook(lambda module, given, said: shared.append(given[0]))
    for (start, end), part in zip(SPANS.values(), step.parts, strict=True):
        said = call_model(TaskHead(model, (start, end)), part.inputs)
        own = linear(shared[-1], last.weight[start:end], last.bias[start:end])
        assert torch.allclose(said, own, atol=1e-6)
    hook.remove()
    learned.joined.workload.loss(model, TaskBatches(step.parts), 0.0).backward()
    whole = last.weight.grad
    assert whole is not None
    losses = by_hand(model, step)
    for task, share in (("mood", 0.75), ("sense", 0.25)):
        start, end = SPANS[task]
        (own,) = torch.autograd.grad(share * losses[task], last.weight, retain_graph=True)
        assert torch.allclose(whole[start:end], own[start:end], atol=1e-6)
        assert own[:start].abs().sum() + own[end:].abs().sum() == 0, "the head of another task is left alone"


def test_one_task_by_itself_gives_the_bytes_of_a_run(
    world: World, parts: dict[str, TaskPart], tmp_path: Path
) -> None:
    files = []
    for place, several in (("alone", False), ("joined", True)):
        own = written(parts, tmp_path / place)["mood"]
        rows = load_rows(own.paths.dataset)
        write_student_tokenizer(STUDENT, Cache.open(own.paths.cache), rows, own.paths.out / "tokenizer")
        job = Job(1, 1, STUDENT, own.recipe, own.paths, parts={"mood": own} if several else {})
        done = train_seed(job)
        files.append((tmp_path / place / "seed-1" / "model.safetensors").read_bytes())
        assert done.teacher_rows_seen == 2 * len(rows.select("train", POOL))
    assert files[0] == files[1]


def ids(batches: list[DistillBatch]) -> list[list[int]]:
    return [batch.inputs["input_ids"][batch.mask].tolist() for batch in batches]


def test_the_longest_task_has_the_order_of_its_own_run_and_shorter_ones_go_round_again(
    learned: Learned,
) -> None:
    whole, own = learned.joined.workload, learned.lessons
    steps = list(whole.batches(1))
    assert whole.steps == max(lesson.steps for lesson in own.values()) == 2 * len(steps)
    longest, shorter = (ids([step.parts[place] for step in steps]) for place in (0, 1))
    assert longest == ids(list(own["mood"].batches(1)))
    rounds = [*ids(list(own["sense"].batches(1))), *ids(list(own["sense"].batches(1 + ROUND)))]
    once = len(rounds) // 2
    assert len(steps) > once, "or nothing goes round again"
    assert shorter == [*rounds, *ids(list(own["sense"].batches(1 + 2 * ROUND)))][: len(steps)]
    assert rounds[:once] != rounds[once:]
    assert sorted(chain(*rounds[:once])) == sorted(chain(*rounds[once:]))


def test_the_order_is_a_function_of_seed_and_epoch_alone(
    world: World, parts: dict[str, TaskPart], learned: Learned
) -> None:
    """Whatever was read before, however much, and however much tasks weigh."""
    wanted = [ids(list(step.parts)) for step in learned.joined.workload.batches(1)]
    again = Learned(world, parts)
    again.step()
    again.joined = MultitaskWorkload(again.lessons, {"mood": 0.1, "sense": 9.0})
    assert [ids(list(step.parts)) for step in again.joined.workload.batches(1)] == wanted
    assert [ids(list(step.parts)) for step in again.joined.workload.batches(0)] != wanted


def test_a_state_is_judged_by_weighted_means_and_by_loss_where_any_task_is(
    world: World, parts: dict[str, TaskPart], learned: Learned
) -> None:
    whole = learned.joined.workload
    learned.joined.workload.loss(learned.model, learned.step(), 0.0)
    seen = whole.validate(learned.model)
    mood, sense = (learned.lessons[task].validate(TaskHead(learned.model, SPANS[task])) for task in SPANS)
    assert seen.score == pytest.approx(0.75 * mood.score + 0.25 * sense.score)
    assert seen.loss == pytest.approx(0.75 * mood.loss + 0.25 * sense.loss)
    assert whole.by_loss
    assert not MultitaskWorkload({"mood": learned.lessons["mood"]}, WEIGHTS).workload.by_loss


@pytest.fixture(scope="module")
def trained(
    world: World, vectors: row_worlds.World, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TaskPart]:
    """A run of both tasks in models/both, two seeds."""
    out = tmp_path_factory.mktemp("project") / "models" / "both"
    made = both(world, vectors, out)
    train(made, out, seeds=(0, 1))
    return made


def as_run(task: str) -> TaskRun:
    return TaskRun(
        dataset="reviews", cache="reviews", student="fc", recipe=f"{task}-recipe", seeds=(0, 1), run="both"
    )


def test_the_record_tells_of_every_task_as_of_a_run(trained: dict[str, TaskPart]) -> None:
    record = json.loads((trained["mood"].paths.out / "training.json").read_text())
    assert {t: r["family"] for t, r in record["tasks"].items()} == {
        "mood": "KD + extra text, several tasks", "sense": "KD, several tasks"
    }  # fmt: skip
    for place, whole in enumerate(record["seeds"]):
        own = [record["tasks"][task]["seeds"][place] for task in SPANS]
        assert [seed["seed"] for seed in own] == [place, place]
        assert sum(seed["rows_seen"] for seed in own) == whole["rows_seen"]
        assert sum(seed["teacher_rows_seen"] for seed in own) == whole["teacher_rows_seen"] > 0
        for at, point in enumerate(whole["curve"]):
            found = [seed["curve"][at] for seed in own]
            for field in ("validation_accuracy", "validation_loss", "train_loss"):
                mean = 0.75 * found[0][field] + 0.25 * found[1][field]
                assert point[field] == pytest.approx(mean, abs=1e-6)
            assert sum(part["rows"] for part in found) == point["rows"]
        assert whole["best_loss"] == pytest.approx(0.75 * own[0]["best_loss"] + 0.25 * own[1]["best_loss"])
    rows = load_rows(trained["mood"].paths.dataset)
    assert record["tasks"]["mood"]["seeds"][0]["rows_seen"] == 2 * len(rows.select("train", POOL))


def test_labels_alone_beside_a_teacher_count_no_row_of_that_teacher(
    parts: dict[str, TaskPart], tmp_path: Path
) -> None:
    own = {**parts, "mood": parts["mood"]._replace(recipe=recipe("mood", alpha=1.0, pool=False))}
    record = train(own, tmp_path / "both")
    seen = {task: record["tasks"][task]["seeds"][0]["teacher_rows_seen"] for task in own}
    assert seen["mood"] == 0 < seen["sense"]
    assert record["seeds"][0]["teacher_rows_seen"] == seen["sense"]
    assert record["tasks"]["mood"]["family"] == "CE, several tasks"


def answers(part: TaskPart, seed: int, texts: list[str], span: tuple[int, int]) -> torch.Tensor:
    """What a trained student says of a task, one text at a time."""
    model = load_student(part.paths.out / f"seed-{seed}")
    tokens = TextReader(part.paths.out / "tokenizer", STUDENT.max_length, "truncate").read(texts, texts)
    said = []
    with torch.inference_mode():
        for row in range(len(texts)):
            ids_BL = torch.from_numpy(tokens.row(row))[None].long()
            said.append(model(ids_BL, torch.ones_like(ids_BL).bool()))
    return torch.cat(said)[:, span[0] : span[1]]


def test_each_task_is_evaluated_by_its_own_outputs_of_the_student(trained: dict[str, TaskPart]) -> None:
    mood = evaluate_run("mood", as_run("mood"), STUDENT, trained["mood"].paths)
    rows = load_rows(trained["mood"].paths.dataset).only("test")
    for seed in (0, 1):
        said = answers(trained["mood"], seed, rows.texts.to_pylist(), SPANS["mood"])
        right = float((said.argmax(1).numpy() == rows.labels).mean())
        assert mood["accuracy"]["values"][seed] == pytest.approx(right)
    sense = evaluate_run("sense", as_run("sense"), STUDENT, trained["sense"].paths)
    rows = load_rows(trained["sense"].paths.dataset).only("test")
    said = answers(trained["sense"], 1, rows.texts.to_pylist(), SPANS["sense"])
    held = pq.read_table(trained["sense"].paths.cache / "logits").to_pandas().set_index("row_id")["embedding"]
    wanted = torch.from_numpy(np.stack(held.loc[rows.row_ids.to_pylist()].tolist()))
    found = cosine_similarity(said, wanted).mean().item()
    assert sense["cosine"]["values"][1] == pytest.approx(found, abs=1e-5)
    assert (mood["about"]["run"], mood["about"]["task"]) == ("both", "sequence-classification")
    assert sense["latency_ms_batch_1"]["mean"] > 0


def test_a_task_is_exported_as_a_model_of_its_own_and_vectors_say_why_not(
    trained: dict[str, TaskPart], tmp_path: Path
) -> None:
    limits = Export(int8_max_loss=100.0)
    record = export_run("mood", as_run("mood"), STUDENT, limits, trained["mood"].paths, tmp_path / "mood")
    own = json.loads((trained["mood"].paths.out / "training.json").read_text())["tasks"]["mood"]
    seed = best_seed(own)
    assert record["about"]["seed"] == seed
    text = "good film warm plot"
    answer = Predictor(tmp_path / "mood", "float32").predict(text)
    shares = answers(trained["mood"], seed, [text], SPANS["mood"]).softmax(1)[0]
    assert list(answer.probabilities.values()) == pytest.approx(shares.tolist(), abs=1e-4)
    paths = trained["sense"].paths
    refused = export_run("sense", as_run("sense"), STUDENT, limits, paths, tmp_path / "sense")
    assert "sentence-embedding" in refused["about"]["not_exported"]


def test_the_report_has_each_task_beside_the_runs_of_its_dataset(
    trained: dict[str, TaskPart], world: World
) -> None:
    root = trained["mood"].paths.out.parent.parent
    single = world.params.runs["fc-kd-pool"]
    paths = world.run_paths(root / "models" / "fc-kd-pool")
    train_run("fc-kd-pool", single, STUDENT, world.params.recipes["kd-pool"], paths, Workers(seeds_at_once=2))
    found = {"fc-kd-pool": evaluate_run("fc-kd-pool", single, STUDENT, paths)}
    for task in SPANS:
        found[task] = evaluate_run(task, as_run(task), STUDENT, trained[task].paths)
        found[task]["about"]["dataset"] = {"mood": "toy", "sense": "other"}[task]
    for name, content in found.items():
        write_json(content, root / "eval" / f"{name}.json")
    for name in ("capture", "export"):
        (root / name).mkdir()
    build_report(*(root / name for name in ("eval", "capture", "models", "export")), root / "index.html")
    page = (root / "index.html").read_text()
    assert '<th scope="row">mood</th>' in page
    assert '<th scope="row">sense</th>' in page
    assert "mood-recipe, in both" in page, "curves tell it from a run by the same recipe"
    assert "KD + extra text, several tasks" not in page, "with no run on labels alone nothing is compared"
    assert page.count("training both") == 2, "one bar in each dataset's section"


def test_a_tokenizer_of_its_own_is_learned_from_the_training_text_of_all_tasks(
    parts: dict[str, TaskPart], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []

    def learn(texts: list[str], *rest: Any) -> None:
        heard.extend(texts)
        raise KeyboardInterrupt

    monkeypatch.setattr(TextReader, "learn", learn)
    with pytest.raises(KeyboardInterrupt):
        train(parts, tmp_path / "both", FCStudent(kind="fc", tokenizer=50))
    expected = []
    for part in parts.values():
        rows = load_rows(part.paths.dataset)
        expected += rows.texts.take(rows.select("train", POOL)).to_pylist()
    assert heard == expected


def test_teachers_of_other_tokenizers_need_a_student_with_one_of_its_own(
    parts: dict[str, TaskPart], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    world = row_worlds.vectors(tmp_path / "there", **EMBEDDING)
    words = tmp_path / "there" / "model" / "tokenizer.json"
    words.write_text(words.read_text().replace('"good"', '"gold"'))
    world.all_of_it()
    paths = world.paths(tmp_path / "both")._replace(task="sense")
    own = {**parts, "sense": parts["sense"]._replace(paths=paths)}
    with pytest.raises(SpecMismatch, match=r"multitask\.both come from different tokenizers") as refused:
        train(own, tmp_path / "both")
    assert [m.field for m in refused.value.mismatches] == ["tasks.sense: tokenizer.content"]
    assert "tokenizer: 8000" in str(refused.value)
    assert not (tmp_path / "both").exists()
    train(own, tmp_path / "both", FCStudent(kind="fc", embedding=4, hidden=4, tokenizer=40))


def test_every_task_is_refused_as_a_run_of_its_own_would_be(
    world: World, parts: dict[str, TaskPart], tmp_path: Path
) -> None:
    there = parts["sense"]
    unverified = there.paths._replace(verified=tmp_path / "x.json")
    for changed, error, said in (
        (there._replace(recipe=recipe("sense", pool=True)), DataError, r"runs\.sense: its .* on the pool"),
        (there._replace(recipe=recipe("sense", divergence="forward")), SpecMismatch, r"recipe\.divergence"),
        (there._replace(paths=unverified), SpecMismatch, "was verified"),
    ):
        with pytest.raises(error, match=said):
            train({**parts, "sense": changed}, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_task_that_a_student_never_learned_is_refused(trained: dict[str, TaskPart], tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"learned \['mood', 'sense'\], not taste"):
        load_student(trained["mood"].paths.out / "seed-0", "taste")
