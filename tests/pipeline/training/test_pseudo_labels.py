"""Pseudo-labels: from the cache, those that the teacher in memory would give; known labels stay."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent
from pipeline.data.rows import NO_LABEL, POOL
from pipeline.data.tokenizer import TextReader
from pipeline.engines.loading import load_classifier
from pipeline.objectives.classification import pseudo_labels
from pipeline.streaming.model_inputs import call_model, for_transformers
from pipeline.students.registry import build_student
from pipeline.training.job import Job
from pipeline.training.rows_workload import rows_workload
from pipeline.training.run import write_student_tokenizer
from pipeline.training.seed import train_seed
from pipeline.training.workload import TrainingData
from storage import Cache
from tests.pipeline.conftest import World

RECIPE = Recipe(alpha=1.0, pseudo_labels=True, pool=True, epochs=2, batch_rows=16)
STUDENT = FCStudent(kind="fc", embedding=8, hidden=8, dropout=0.0)


def test_the_loss_from_the_cache_is_that_with_the_teacher_in_memory(world: World) -> None:
    rows, cache = world.rows(), Cache.open(world.cache)
    reader = TextReader(cache.tokenizer_dir, STUDENT.max_length, "truncate")
    lesson = rows_workload(STUDENT, RECIPE, TrainingData(cache, rows, reader), seed=0)
    torch.manual_seed(0)
    student = build_student(STUDENT, reader.num_ids, 2).eval()
    teacher = load_classifier(world.teacher, task="sequence-classification", pad_token_id=reader.pad_id)
    num_rows = num_guessed = 0
    with torch.inference_mode():
        for batch in lesson.batches(0):
            said = teacher(**for_transformers(batch.inputs)).logits.argmax(1)
            unknown = batch.labels_T == NO_LABEL
            wanted = cross_entropy(
                call_model(student, batch.inputs), torch.where(unknown, said, batch.labels_T)
            )
            assert lesson.loss(student, batch, 0.0).item() == pytest.approx(wanted.item(), abs=1e-6)
            num_rows, num_guessed = num_rows + len(unknown), num_guessed + int(unknown.sum())
    assert num_guessed == len(rows.select(POOL)) > 0
    assert num_rows == len(rows.select("train", POOL))


def test_a_label_that_is_known_stays() -> None:
    teacher = torch.tensor([[0.1, 2.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    found = pseudo_labels(torch.tensor([0, NO_LABEL, NO_LABEL]), teacher)
    assert found.tolist() == [0, 0, 2]


def test_the_record_counts_the_rows_whose_target_was_looked_at(world: World, tmp_path: Path) -> None:
    rows, cache = world.rows(), Cache.open(world.cache)
    write_student_tokenizer(STUDENT, cache, rows, tmp_path / "tokenizer")
    done = train_seed(Job(0, 1, STUDENT, RECIPE, world.run_paths(tmp_path)))
    assert done.teacher_rows_seen == 2 * len(rows.select(POOL))
    assert done.fit.rows_seen == 2 * len(rows.select("train", POOL))
    assert np.isfinite(done.fit.best_loss)


@pytest.mark.parametrize("changes", [{"alpha": 0.5}, {"pool": False}])
def test_pseudo_labels_are_labels_of_a_pool(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="set alpha: 1 and pool: true"):
        Recipe(**{"alpha": 1.0, "pool": True, "pseudo_labels": True, **changes})


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("CE", {"alpha": 1.0}),
        ("CE + extra text", {"alpha": 1.0, "pool": True, "pseudo_labels": True}),
        ("KD", {"alpha": 0.5}),
        ("KD + extra text", {"alpha": 0.0, "pool": True}),
    ],
)
def test_a_recipe_knows_what_it_is_compared_as(family: str, fields: dict[str, Any]) -> None:
    recipe = Recipe(**fields)
    assert recipe.family == family
    assert recipe.labels_only == (family == "CE")
