"""Numbers that change while a student trains: closed cases, both ends, and what they must not hide."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import load_params
from pipeline.config.recipes import Recipe
from pipeline.config.schedules import ByConfidence, Schedule, bounds, value_at
from pipeline.data.tokenizer import TextReader
from pipeline.losses.divergences import confidence_temperature, distillation_loss
from pipeline.objectives.base import SoftLossSettings, Validation
from pipeline.objectives.classification import CLASSIFICATION
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.verified import open_inputs
from pipeline.training.checks import check_truncated
from pipeline.training.loop import TrainingFunctions, TrainingSettings, fit
from pipeline.training.rows_workload import rows_workload
from pipeline.training.workload import TrainingData
from storage.codecs import Threshold, TopK
from storage.errors import ConfigError, SpecMismatch
from tests import toy
from tests.pipeline.conftest import World

RISES = {"schedule": "linear", "from": 0.0, "to": 1.0}


def schedule(name: str, start: float = 1.0, end: float = 3.0, **shares: float) -> Schedule:
    return Schedule.model_validate({"schedule": name, "from": start, "to": end, **shares})


@pytest.mark.parametrize(
    ("made", "values"),
    [
        (schedule("linear"), {0.0: 1.0, 0.25: 1.5, 0.5: 2.0, 1.0: 3.0}),
        (schedule("cosine"), {0.0: 1.0, 1 / 3: 1.5, 0.5: 2.0, 2 / 3: 2.5, 1.0: 3.0}),
        (schedule("linear", 3.0, 1.0), {0.0: 3.0, 0.25: 2.5, 1.0: 1.0}),
        (schedule("wsd", warmup=0.2, decay=0.4), {0.0: 1, 0.1: 2, 0.2: 3, 0.5: 3, 0.6: 3, 0.8: 2, 1.0: 1}),
        (schedule("wsd", warmup=0.0, decay=0.0), {0.0: 3.0, 0.5: 3.0, 1.0: 3.0}),
        (schedule("wsd", warmup=0.5, decay=0.5), {0.25: 2.0, 0.5: 3.0, 0.75: 2.0}),
    ],
)
def test_a_schedule_has_the_values_of_its_closed_cases(made: Schedule, values: dict[float, float]) -> None:
    for done, value in values.items():
        assert value_at(made, done) == pytest.approx(value, abs=1e-12)
    assert set(bounds(made)) == {1.0, 3.0}


def test_a_plain_number_never_changes() -> None:
    assert [value_at(0.3, done) for done in (0.0, 0.5, 1.0)] == [0.3] * 3
    assert bounds(0.3) == (0.3,)
    assert bounds(ByConfidence(by="confidence", low=1.0, high=4.0)) == (1.0, 4.0)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("alpha", {"schedule": "linear", "from": 0.0, "to": 1.5}, "both ends must be between 0 and 1"),
        ("temperature", {"schedule": "linear", "from": 0.0, "to": 1.5}, "both ends must be greater than 0"),
        ("alpha", {"by": "confidence", "low": 0.1, "high": 0.5}, "recipes.kd-pool.alpha"),
        ("temperature", {"by": "confidence", "low": 4.0, "high": 1.0}, "low 4 is more than high 1"),
        ("temperature", {"by": "confidence", "low": 0.0, "high": 1.0}, "temperature.low"),
        ("alpha", {"schedule": "linear", "from": 0.0, "to": 1.0, "decay": 0.1}, "decay: only a wsd schedule"),
        (
            "alpha",
            {"schedule": "wsd", "from": 0, "to": 1, "warmup": 0.6, "decay": 0.6},
            "more than all steps",
        ),
        (
            "alpha",
            {"schedule": "linear", "form": 0.0, "to": 1.0},
            "alpha.form: unknown key; did you mean 'from'",
        ),
        ("alpha", {"schedule": "linaer", "from": 0.0, "to": 1.0}, "did you mean 'linear'"),
        ("alpha", {"schedule": "linear", "to": 1.0}, "alpha.from: Field required"),
        ("temperature", "2", "recipes.kd-pool.temperature"),
        ("match", {"states": {"weight": {**RISES, "to": 0.0}}}, "states.weight: no end may be below 0"),
        ("match", {"states": {"weight": {**RISES, "to": -1.0}}}, "states.weight: no end may be below 0"),
        ("match", {"prediction": {**RISES, "to": 0.0}, "states": {}}, "match.prediction: no end may be"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_with_its_place(
    tmp_path: Path, field: str, value: Any, said: str
) -> None:
    shelves = copy.deepcopy(toy.params())
    shelves["recipes"]["kd-pool"][field] = value
    toy.write_params(tmp_path, shelves)
    with pytest.raises(ConfigError) as refused:
        load_params(tmp_path / "params.yaml")
    assert said in str(refused.value)


def test_a_pool_is_refused_where_no_end_of_the_schedule_looks_at_the_teacher() -> None:
    one = {"schedule": "linear", "from": 1.0, "to": 1.0}
    with pytest.raises(ValueError, match="alpha 1 trains on labels only"):
        Recipe.model_validate({"alpha": one, "pool": True})
    falling = Recipe.model_validate({"alpha": {**one, "to": 0.5}, "pool": True})
    assert not falling.labels_only
    assert Recipe.model_validate({"alpha": one}).labels_only


def test_a_schedule_that_leaves_temperature_1_is_refused_on_sampled_targets() -> None:
    sampled = Threshold(tau=0.07, seed=0, layout="plain", ranks=None)
    for temperature in (schedule("linear", 1.0, 2.0), schedule("wsd", 2.0, 1.0), 2.0):
        with pytest.raises(SpecMismatch, match=r"recipe\.temperature"):
            check_truncated("runs.a", sampled, "forward", temperature)
    check_truncated("runs.a", sampled, "forward", schedule("linear", 1.0, 1.0))
    check_truncated("runs.a", TopK(k=4, layout="plain", ranks=None), "forward", schedule("linear", 1.0, 2.0))


def test_a_temperature_by_confidence_is_refused_where_classes_are_missing() -> None:
    sure = ByConfidence(by="confidence", low=1.0, high=4.0)
    for codec in (
        TopK(k=4, layout="plain", ranks=None),
        Threshold(tau=0.07, seed=0, layout="plain", ranks=None),
    ):
        with pytest.raises(SpecMismatch, match=r"by confidence, 1 to 4"):
            check_truncated("runs.a", codec, "forward", sure)
    check_truncated("runs.a", None, "forward", sure)


def test_the_temperature_by_confidence_of_even_certain_and_half_sure_rows() -> None:
    """Of four classes, a probability of 5/8 is half way from 1/4 to 1."""
    rows = torch.tensor([[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.625, 0.125, 0.125, 0.125]], dtype=torch.float64)
    found = confidence_temperature(rows.clamp(min=1e-300).log(), 1.0, 4.0)
    assert found.squeeze(1).tolist() == pytest.approx([1.0, 4.0, 2.5], abs=1e-9)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "skewed"])
def test_a_temperature_a_row_is_the_mean_of_rows_with_a_temperature_each(divergence: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    temperature = confidence_temperature(teacher, 1.0, 4.0)
    alone = [
        distillation_loss(student[i : i + 1], teacher[i : i + 1], temperature[i].item(), divergence)
        for i in range(5)
    ]
    found = distillation_loss(student, teacher, temperature, divergence)
    assert found.item() == pytest.approx(torch.stack(alone).mean().item(), rel=1e-12)
    assert found.ndim == 0


def test_training_tells_the_loss_how_much_is_done() -> None:
    told: list[float] = []
    model = torch.nn.Linear(1, 1)

    def batches(epoch: int) -> list[DistillBatch]:
        one = torch.ones(1, 1)
        return [DistillBatch({"input_ids": one.long()}, torch.zeros(1).long(), one)] * 3

    def loss(net: torch.nn.Module, batch: DistillBatch, done: float) -> torch.Tensor:
        told.append(done)
        return net(torch.ones(1, 1)).sum()

    settings = TrainingSettings(2, 6, 0.01, 0.0, 0.0, 1, 9)
    fit(model, TrainingFunctions(batches, loss, lambda _: Validation(0.5, 1.0)), settings)
    assert told == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        ({"schedule": "linear", "from": 1.0, "to": 3.0}, 2.0),
        ({"by": "confidence", "low": 1.0, "high": 3.0}, None),
    ],
)
def test_the_lesson_has_the_recipes_numbers_of_that_step(
    world: World, tmp_path: Path, temperature: dict[str, Any], expected: float | None
) -> None:
    """Half of the training is done: alpha is 0.25 of a way from 0 to 0.5, and so on."""
    wanted = {"alpha": {"schedule": "linear", "from": 0.0, "to": 0.5}, "temperature": temperature}
    recipe = Recipe.model_validate({**wanted, "batch_rows": 16})
    cache, rows = open_inputs(world.run_paths(tmp_path))
    student = world.params.students["fc"]
    reader = TextReader(cache.tokenizer_dir, 32, "truncate")
    lesson = rows_workload(student, recipe, TrainingData(cache, rows, reader), 0)
    batch = next(lesson.batches(0))
    said = torch.randn(len(batch.labels_T), 2, generator=torch.Generator().manual_seed(0))
    assert isinstance(batch.teacher, torch.Tensor)
    hot = expected or confidence_temperature(batch.teacher, 1.0, 3.0)
    by_hand = CLASSIFICATION.mixed_loss(said, batch.labels_T, batch.teacher, 0.25, SoftLossSettings(hot))

    class Says(torch.nn.Module):
        reads = ()

        def forward(self) -> torch.Tensor:
            return said

    assert lesson.loss(Says(), batch, 0.5).item() == pytest.approx(by_hand.item(), rel=1e-6)
