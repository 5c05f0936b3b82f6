"""DistillationLoss: the numbers of a run's own loss; what does not fit is refused with what was found."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from pipeline.config.caches import CacheEntry
from pipeline.config.recipes import Recipe
from pipeline.config.students import Student
from pipeline.data.inputs import student_reader
from pipeline.data.tokenizer import TextReader
from pipeline.objectives.loss import DistillationLoss
from pipeline.streaming.batch import DistillBatch, Stream
from pipeline.streaming.dataset import CachedDataset
from pipeline.streaming.plain_batch import PlainBatch
from pipeline.streaming.verified import open_rows
from pipeline.training.documents_workload import documents_workload
from pipeline.training.rows_workload import rows_workload
from pipeline.training.workload import TrainingData, Workload, training_splits
from storage.errors import ConfigError, DataError, SpecMismatch
from storage.mixture import open_cache
from tests.pipeline import row_worlds
from tests.pipeline.conftest import World
from tests.pipeline.prose import Prose

FC: Student = TypeAdapter(Student).validate_python({"kind": "fc", "embedding": 8, "hidden": 8})
MLP: Student = TypeAdapter(Student).validate_python({"kind": "mlp", "hidden": [8]})
Pair = tuple[DistillBatch, PlainBatch]


class Fixed(torch.nn.Module):
    """A student whose outputs are given, whatever it reads."""

    reads = ()

    def __init__(self, outputs: torch.Tensor, head: torch.Tensor | None = None) -> None:
        super().__init__()
        self.outputs, self.head = outputs, head

    def forward(self) -> torch.Tensor:
        return self.outputs


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def workload(cache: Path, dataset: Path, recipe: Recipe, student: Student = FC, **stream: int) -> Workload:
    """What a run of this recipe minimises."""
    opened = open_cache(cache)
    rows = open_rows(opened, dataset).only("validation", *training_splits(recipe))
    if opened.identity.spec.per_position:
        data = TrainingData(opened, rows, TextReader(opened.tokenizer_dir, 9, "truncate"))
        return documents_workload(recipe, data, 0, Stream(**stream))
    where = Path() if rows.pixels is not None else opened.tokenizer_dir
    data = TrainingData(opened, rows, student_reader(student, rows, where))
    return rows_workload(student, recipe, data, 0, Stream(**stream))


def pairs(cache: Path, dataset: Path, recipe: Recipe, made: Workload, **ranks: int) -> Iterator[Pair]:
    """The same batches of the run and of the dataset."""
    by_tokens = open_cache(cache).identity.spec.per_position
    size = {"batch_tokens": recipe.batch_tokens, "max_length": 9} if by_tokens else {}
    size = size or {"batch_size": recipe.batch_rows}
    data = CachedDataset(cache, dataset, pool=bool(recipe.pool), **size, **ranks)
    yield from zip(made.batches(0), data, strict=True)


def check_same(
    cache: Path, dataset: Path, recipe: Recipe, loss: DistillationLoss, student: Student = FC
) -> None:
    """The loss is that of a run, to the bit, on every batch."""
    made = workload(cache, dataset, recipe, student)
    for number, (batch, plain) in enumerate(pairs(cache, dataset, recipe, made)):
        logits = random(len(plain["labels"]), made.num_outputs, seed=number)
        expected = made.loss(Fixed(logits), batch, 0.0)
        assert torch.equal(loss(logits, plain["labels"], plain["targets"]), expected)


def vectors(root: Path) -> row_worlds.World:
    return row_worlds.vectors(root, embedding={"pool": "mean", "normalised": True})


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "skewed"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_it_is_the_loss_of_a_run_of_a_classifier(world: World, divergence: Any, alpha: float) -> None:
    recipe = Recipe(
        alpha=alpha, temperature=2.0, divergence=divergence, skew=0.3, batch_rows=16, pool=alpha < 1
    )
    check_same(world.cache, world.dataset, recipe, DistillationLoss(alpha, 2.0, divergence, 0.3))


@pytest.mark.parametrize(
    ("make", "task", "alpha", "temperature", "divergence"),
    [
        (row_worlds.several, "multi-label-classification", 0.5, 2.0, "forward"),
        (row_worlds.numbers, "regression", 0.5, 1.0, "mse"),
        (vectors, "sentence-embedding", 0.0, 1.0, "cosine"),
        (vectors, "sentence-embedding", 0.0, 1.0, "mse"),
    ],
)
def test_it_is_the_loss_of_a_run_of_every_task_of_rows(
    tmp_path: Path, make: Any, task: str, alpha: float, temperature: float, divergence: Any
) -> None:
    made = make(tmp_path).all_of_it()
    recipe = Recipe(alpha=alpha, temperature=temperature, divergence=divergence, batch_rows=16)
    loss = DistillationLoss(alpha, temperature, divergence, task=task)
    check_same(made.cache, made.dataset, recipe, loss)


def test_it_is_the_loss_of_a_run_of_images(tmp_path: Path) -> None:
    made = row_worlds.images(tmp_path).all_of_it()
    recipe = Recipe(alpha=0.5, temperature=2.0, batch_rows=16)
    check_same(made.cache, made.dataset, recipe, DistillationLoss(0.5, 2.0), MLP)


@pytest.mark.parametrize("targets", [{"codec": "topk", "k": 1}, {"codec": "sample", "draws": 20}])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_it_is_the_loss_of_a_run_with_entries_of_classes(
    world: World, tmp_path: Path, targets: dict[str, Any], alpha: float
) -> None:
    own = world.copy(tmp_path / "own")
    own.capture(targets=targets_of(targets), hidden=None)
    temperature = 2.0 if targets["codec"] == "topk" else 1.0
    recipe = Recipe(alpha=alpha, temperature=temperature, batch_rows=16, pool=alpha < 1)
    check_same(own.cache, own.dataset, recipe, DistillationLoss(alpha, temperature))


def targets_of(section: dict[str, Any]) -> Any:
    return CacheEntry.model_validate({"dataset": "toy", "teacher": "tiny", "targets": section}).targets


@pytest.fixture(scope="module", params=["threshold", "topk"])
def documents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prose:
    """A cache of sampled entries, and one of the k largest."""
    made = Prose(tmp_path_factory.mktemp("documents"))
    made.make_teacher()
    made.capture(**({"codec": "topk", "k": 4} if request.param == "topk" else {}))
    return made


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_fused_loss_is_that_of_a_run_of_a_language_model(documents: Prose, alpha: float) -> None:
    recipe = Recipe(alpha=alpha, batch_tokens=64)
    made, loss = workload(documents.cache, documents.dataset, recipe), DistillationLoss(alpha)
    for number, (batch, plain) in enumerate(pairs(documents.cache, documents.dataset, recipe, made)):
        states = random(*plain["labels"].shape, 16, seed=number)
        head = random(made.num_outputs, 16, seed=1000 + number)
        expected = made.loss(Fixed(states, head), batch, 0.0)
        assert torch.equal(loss.linear(states, head, plain["labels"], plain["targets"]), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_from_logits_it_has_the_gradients_of_the_fused_loss_and_another_constant(
    documents: Prose, alpha: float
) -> None:
    loss = DistillationLoss(alpha)
    constants = []
    for plain in CachedDataset(documents.cache, documents.dataset, batch_tokens=64, max_length=9):
        for seed in range(2):
            states, head, bias = random(*plain["labels"].shape, 16, seed=seed), random(100, 16), random(100)
            fused = loss.linear(states, head, plain["labels"], plain["targets"], bias)
            whole = loss(states @ head.T + bias, plain["labels"], plain["targets"])
            for one, other in zip(
                torch.autograd.grad(fused, (states, head, bias)),
                torch.autograd.grad(whole, (states, head, bias)),
                strict=True,
            ):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
            constants.append((fused - whole).item())
        assert constants[-1] == pytest.approx(constants[-2], abs=1e-4), "it is of the targets alone"
    if alpha == 1:
        assert constants == pytest.approx([0.0] * len(constants), abs=1e-5)


def test_labels_that_a_person_took_away_count_in_no_mean(documents: Prose) -> None:
    """As where a prompt is not learned: labels are a mean over the others, targets one over all."""
    plain = next(iter(CachedDataset(documents.cache, documents.dataset, batch_tokens=64, max_length=9)))
    states, head = random(*plain["labels"].shape, 16), random(100, 16, seed=1)
    labels = plain["labels"].clone()
    labels[:, ::2] = -100
    logits = states @ head.T
    mask = labels != -100
    hard = torch.nn.functional.cross_entropy(logits[mask], labels[mask])
    for compute in (
        lambda alpha: DistillationLoss(alpha)(logits, labels, plain["targets"]),
        lambda alpha: DistillationLoss(alpha).linear(states, head, labels, plain["targets"]),
    ):
        soft = compute(0.0)
        torch.testing.assert_close(compute(1.0), hard)
        torch.testing.assert_close(compute(0.25), 0.25 * hard + 0.75 * soft)
    none = torch.full_like(labels, -100)
    assert DistillationLoss(1.0).linear(states, head, none, plain["targets"]).item() == 0


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_the_mean_over_ranks_is_the_loss_of_the_whole_batch(world: World, num_ranks: int) -> None:
    loss, table = DistillationLoss(0.3, 2.0), random(64, 2)
    whole = CachedDataset(world.cache, world.dataset, pool=True, batch_size=7)
    parts = [
        CachedDataset(world.cache, world.dataset, pool=True, batch_size=7, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]

    def of(plain: PlainBatch) -> torch.Tensor:
        logits = (table[plain["input_ids"]] * plain["attention_mask"][..., None]).sum(1)
        return loss(logits, plain["labels"], plain["targets"])

    for batch, *own in zip(whole, *parts, strict=True):
        mean = torch.stack([of(part) for part in own]).mean()
        torch.testing.assert_close(mean, of(batch))


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_the_mean_over_ranks_is_the_fused_loss_of_the_whole_batch(documents: Prose, num_ranks: int) -> None:
    loss, table, head = DistillationLoss(0.3), random(100, 16), random(100, 16, seed=1)
    arguments: dict[str, Any] = {"batch_tokens": 40, "max_length": 9}
    whole = CachedDataset(documents.cache, documents.dataset, **arguments)
    parts = [
        CachedDataset(documents.cache, documents.dataset, **arguments, rank=rank, num_ranks=num_ranks)
        for rank in range(num_ranks)
    ]

    def of(plain: PlainBatch) -> torch.Tensor:
        return loss.linear(table[plain["input_ids"]], head, plain["labels"], plain["targets"])

    for batch, *own in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.stack([of(part) for part in own]).mean(), of(batch))


def test_attributes_may_change_between_steps(world: World) -> None:
    plain = next(iter(CachedDataset(world.cache, world.dataset)))
    loss, logits = DistillationLoss(0.5, 2.0), random(len(plain["labels"]), 2)
    loss.alpha, loss.temperature = 0.1, 4.0
    expected = DistillationLoss(0.1, 4.0)(logits, plain["labels"], plain["targets"])
    assert torch.equal(loss(logits, plain["labels"], plain["targets"]), expected)
    loss.alpha = 1.5
    with pytest.raises(ConfigError, match=r"alpha: 1\.5, expected 0 to 1"):
        loss(logits, plain["labels"], plain["targets"])


def test_its_settings_are_printed() -> None:
    shown = repr(DistillationLoss(0.5, 2.0))
    assert "alpha=0.5, temperature=2.0, divergence='forward', task='sequence-classification'" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, r"alpha: -0\.1, expected 0 to 1"),
        ({"temperature": 0.0}, r"temperature: 0\.0, expected more than 0"),
        ({"skew": 1.0}, r"skew: 1\.0, expected more than 0 and less than 1"),
        ({"divergence": "backward"}, "divergence: 'backward', expected forward or reverse or jsd or skewed"),
        ({"task": "regression", "temperature": 2.0}, r"temperature: 2\.0, expected 1: regression has no"),
        ({"task": "regression", "divergence": "forward"}, "divergence: 'forward', expected mse"),
        ({"task": "sentence-embedding"}, r"alpha: 0\.5, expected 0: sentence-embedding has no labels"),
        ({"task": "classification"}, "task: 'classification', expected one of sequence-classification"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillationLoss(**settings)


def dense(rows: int = 4, classes: int = 3) -> dict[str, torch.Tensor]:
    return {"logits": torch.zeros(rows, classes)}


def entries(rows: int = 4, tail: bool = True) -> dict[str, torch.Tensor]:
    made = {"positions": torch.arange(rows), "ids": torch.zeros(rows, dtype=torch.int64)}
    made |= {"weights": torch.full((rows,), 0.5)}
    return made | ({"log_tail": torch.full((rows,), 0.5).log()} if tail else {})


@pytest.mark.parametrize(
    ("logits", "labels", "targets", "message"),
    [
        ((4, 3), (5,), dense(), r"labels \(torch.int64\) have the shape \[5\], expected \[4\]"),
        ((4, 3), (4,), dense(5), r"the teacher's logits have the shape \[5, 3\], the student's \[4, 3\]"),
        ((4, 2), (4,), dense(), r"\[4, 3\], the student's \[4, 2\]"),
        ((4,), (4,), dense(), r"logits have the shape \[4\]"),
        ((4, 3), (4,), {}, "targets have the keys .*: no logits, and of entries positions, ids, weights"),
        ((4, 3), (4,), {"ids": torch.zeros(1)}, "of entries positions, weights is missing"),
        ((5, 3), (5,), entries(), "found 4 targets for 5 outputs"),
        (
            (2, 3), (2,), {**dense(), "mask": torch.ones(2, 2, dtype=torch.bool)},
            r"logits have the shape \[2, 3\], expected \[2, 2\] and what belongs to each token",
        ),
        (
            (2, 2, 3), (2,), {**dense(), "mask": torch.ones(2, 2, dtype=torch.bool)},
            r"labels .* have the shape \[2\], expected \[2, 2\]",
        ),
        (
            (4, 3), (4,), {"logits": torch.zeros(2, 5, 3), "teacher_weights": torch.ones(2) / 2},
            r"\[5, 3\], the student's \[4, 3\]",
        ),
    ],
)  # fmt: skip
def test_shapes_and_keys_that_do_not_belong_together_are_refused(
    logits: tuple[int, ...], labels: tuple[int, ...], targets: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        DistillationLoss()(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64), targets)


def test_what_entries_do_not_allow_is_refused() -> None:
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(SpecMismatch, match=r"(?s)reverse.*ids that the cache does not hold"):
        DistillationLoss(divergence="reverse")(logits, labels, entries())
    with pytest.raises(SpecMismatch, match=r"(?s)temperature 1.*the loss would be biased"):
        DistillationLoss(temperature=2.0)(logits, labels, entries(tail=False))
    with pytest.raises(SpecMismatch, match=r"(?s)largest id.*7.*below 3, the student's outputs"):
        DistillationLoss()(logits, labels, entries() | {"ids": torch.full((4,), 7)})
    DistillationLoss(1.0, 2.0, "reverse")(logits, labels, entries(tail=False))  # no soft part is computed


def test_the_fused_loss_needs_entries_and_temperature_1() -> None:
    states, head, labels = torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(SpecMismatch, match="dense targets have no fused loss"):
        DistillationLoss().linear(states, head, labels, dense())
    with pytest.raises(ConfigError, match=r"the fused loss has no temperature: found 2\.0, expected 1"):
        DistillationLoss(temperature=2.0).linear(states, head, labels, entries())
    with pytest.raises(DataError, match=r"states have the shape \[5\]"):
        DistillationLoss().linear(torch.zeros(5), head, labels, entries())


def test_it_is_differentiable_where_no_row_has_a_label() -> None:
    logits = random(4, 3)
    loss = DistillationLoss(1.0)(logits, torch.full((4,), -100), dense())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(4, 3))
