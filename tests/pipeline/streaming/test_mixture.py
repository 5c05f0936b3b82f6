"""Several teachers: the loss from their caches is that with all in memory; rows that a cache lacks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.config.recipes import Recipe
from pipeline.data.rows import POOL
from pipeline.data.tokenizer import TextReader
from pipeline.engines.loading import load_classifier
from pipeline.evaluation import latency
from pipeline.evaluation.evaluate import evaluate_run
from pipeline.losses.divergences import MixedTargets, distillation_loss
from pipeline.streaming.model_inputs import for_transformers
from pipeline.streaming.verified import open_inputs
from pipeline.training.rows_workload import rows_workload
from pipeline.training.workload import TrainingData, Workload
from storage import Cache
from storage.errors import DataError, SpecMismatch
from storage.mixture import Mixture
from tests.pipeline.two_teachers import NAMES, Two


def lesson(two: Two, recipe: Recipe, name: str = "both") -> Workload:
    cache, rows = open_inputs(two.paths(two.root, name))
    reader = TextReader(cache.tokenizer_dir, 32, "truncate")
    return rows_workload(two.params.students["fc"], recipe, TrainingData(cache, rows, reader), 0)


class Says(torch.nn.Module):
    """A student that says the same logits every time."""

    reads = ()

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self) -> torch.Tensor:
        return self.logits


def test_the_mean_of_two_teachers_by_hand() -> None:
    """(0.9, 0.1) and (0.5, 0.5) are (0.7, 0.3); at T = 2 the first is (3, 1) / 4: (0.625, 0.375)."""
    logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]], dtype=torch.float64).log()
    mixed = MixedTargets(logits, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert mixed.at(1.0).softmax(-1)[0].tolist() == pytest.approx([0.7, 0.3], abs=1e-12)
    assert (mixed.at(2.0) / 2).softmax(-1)[0].tolist() == pytest.approx([0.625, 0.375], abs=1e-12)
    uneven = mixed._replace(weights=torch.tensor([0.75, 0.25], dtype=torch.float64))
    assert uneven.at(1.0).softmax(-1)[0].tolist() == pytest.approx([0.8, 0.2], abs=1e-12)
    hot = torch.tensor([[2.0]], dtype=torch.float64)  # a temperature a row
    assert torch.equal(mixed.at(hot), mixed.at(2.0))


def test_its_gradient_is_the_mean_of_those_to_each_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    student, *said = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    student.requires_grad_()
    mixed = MixedTargets(torch.stack(said), torch.tensor([0.75, 0.25], dtype=torch.float64))
    (found,) = torch.autograd.grad(distillation_loss(student, mixed.at(2.0), 2.0), student)
    each = [torch.autograd.grad(distillation_loss(student, one, 2.0), student)[0] for one in said]
    torch.testing.assert_close(found, 0.75 * each[0] + 0.25 * each[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "skewed"])
def test_the_loss_from_two_caches_is_that_with_both_teachers_in_memory(two: Two, divergence: Any) -> None:
    recipe = Recipe(alpha=0.25, temperature=2.0, batch_rows=16, pool=True, divergence=divergence)
    made = lesson(two, recipe)
    models = [load_classifier(two.root / f"teacher-{name}").cpu().eval() for name in NAMES]
    checked = 0
    for batch in made.batches(0):
        logits_BC = torch.randn(len(batch.labels_T), 2, generator=torch.Generator().manual_seed(checked))
        with torch.inference_mode():
            live = [m(**for_transformers(batch.inputs)).logits for m in models]
        mean = sum(
            weight * (said.double() / 2).softmax(-1) for weight, said in zip((0.75, 0.25), live, strict=True)
        )
        soft = distillation_loss(logits_BC.double(), 2 * mean.log(), 2.0, divergence)
        labelled = batch.labels_T != -1
        right = logits_BC.double().log_softmax(-1)[labelled].gather(1, batch.labels_T[labelled][:, None])
        hard = -right.mean() if labelled.any() else torch.zeros(())
        expected = 0.25 * hard + 0.75 * soft
        assert made.loss(Says(logits_BC), batch, 0.0).item() == pytest.approx(expected.item(), rel=1e-4)
        checked += len(batch.labels_T)
    assert checked == len(two.rows().select("train", POOL))


def test_a_cache_mixed_with_its_own_copy_is_that_cache(two: Two, tmp_path: Path) -> None:
    own = two.copy(tmp_path / "own")
    shutil.copytree(own.caches / "first", own.caches / "twin")
    shutil.copy(own.records / "first.json", own.records / "twin.json")
    own.mix("twins", ("first", "twin"), weights=(3.0, 1.0))
    recipe = Recipe(batch_rows=16, pool=True)
    batches = zip(
        lesson(own, recipe, "twins").batches(0), lesson(own, recipe, "first").batches(0), strict=True
    )
    for both, one in batches:
        assert torch.equal(both.inputs["input_ids"], one.inputs["input_ids"])
        assert isinstance(both.teacher, MixedTargets)
        assert isinstance(one.teacher, torch.Tensor)
        torch.testing.assert_close(both.teacher.at(2.0).softmax(-1), one.teacher.softmax(-1))


def test_shards_of_the_second_cache_may_be_cut_and_ordered_in_any_way(two: Two, tmp_path: Path) -> None:
    own = two.copy(tmp_path / "own")
    capture_cache(CaptureJob(
        "second", own.entry(shard_rows=7), own.dataset, own.root / "teacher-second", own.caches / "cut",
        type(own.store)(tmp_path / "store")))  # fmt: skip
    manifest = Cache.open(own.caches / "cut").manifest_sha256
    (own.records / "cut.json").write_text(json.dumps({"manifest": manifest}))
    other = own.mix("cut-both", ("first", "cut"))
    row_ids = own.rows().row_ids
    plain = Mixture.open(two.caches / "both").others(row_ids)
    assert len(other.members[1].cache.shards) > len(other.members[0].cache.shards)
    np.testing.assert_allclose(other.others(row_ids), plain, rtol=1e-5, atol=1e-6)


def test_a_run_over_a_mixture_is_trained_and_evaluated(
    two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = two.train(tmp_path / "out")
    assert record["seeds"][0]["teacher_rows_seen"] == len(two.rows().select("train", POOL))
    assert "skipped_rows" not in record
    own = (two.caches / "first" / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == own
    monkeypatch.setattr(latency, "LATENCY_REPEATS", 2)
    run = two.params.runs["fc-kd-pool"].model_copy(update={"cache": "both", "seeds": (0,)})
    found = evaluate_run("fc-both", run, two.params.students["fc"], two.paths(tmp_path / "out"))
    assert (found["about"]["cache"], found["about"]["caches"]) == ("both", ["first", "second"])
    assert found["about"]["teacher"] is None
    assert 0 <= found["agreement"]["mean"] <= 1


def test_a_mixture_of_a_mixture_is_taken_apart_and_its_weights_are_multiplied(
    two: Two, tmp_path: Path
) -> None:
    own = two.copy(tmp_path / "own")
    own.teach("third", 5)
    made = own.mix("three", ("both", "third"), weights=(2.0, 2.0))
    assert {member.name: member.weight for member in made.members} == {
        "first": pytest.approx(0.375), "second": pytest.approx(0.125), "third": pytest.approx(0.5)
    }  # fmt: skip
    again = own.mix("more", ("both", "first"))
    weights = {member.name: member.weight for member in again.members}
    assert weights == {"first": pytest.approx(0.875), "second": pytest.approx(0.125)}


def without(two: Two, tmp_path: Path, split: str, missing: str, rows_lost: int = 1000) -> Two:
    """A project whose second cache lacks the first so many rows of a split."""
    own = two.copy(tmp_path / "own")
    rows = own.rows()
    kept = np.ones(len(rows.splits), bool)
    kept[rows.select(split)[:rows_lost]] = False
    columns = {"row_id": rows.row_ids, "text": rows.texts, "label": pa.array(rows.labels)}
    columns["split"] = pa.array(rows.splits.tolist())
    few = own.root / "few"
    shutil.copytree(own.dataset, few)
    pq.write_table(pa.table(columns).filter(pa.array(kept)), few / "rows.parquet")
    capture_cache(
        CaptureJob("second", own.entry(), few, own.root / "teacher-second", own.caches / "second", own.store)
    )
    manifest = Cache.open(own.caches / "second").manifest_sha256
    (own.records / "second.json").write_text(json.dumps({"manifest": manifest}))
    own.mix(missing=missing)
    return own


def test_a_row_that_a_cache_lacks_is_an_error_that_names_the_cache(two: Two, tmp_path: Path) -> None:
    own = without(two, tmp_path, POOL, "error", 1)
    with pytest.raises(SpecMismatch, match=r"both.second does not fit runs\.fc-both") as refused:
        own.train(tmp_path / "out")
    assert "rows without one" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", POOL])
def test_rows_that_a_cache_lacks_can_be_left_out_and_are_counted(
    two: Two, tmp_path: Path, split: str
) -> None:
    own = without(two, tmp_path, split, "skip", 7)
    record = own.train(tmp_path / "out")
    assert record["skipped_rows"] == 7
    assert record["seeds"][0]["rows_seen"] == len(own.rows().select("train", POOL)) - 7


@pytest.mark.parametrize("split", ["validation", "test"])
def test_rows_to_measure_on_are_never_left_out(two: Two, tmp_path: Path, split: str) -> None:
    own = without(two, tmp_path, split, "skip", 1)
    with pytest.raises(SpecMismatch, match="rows without one"):
        own.train(tmp_path / "out")


def test_nothing_left_to_train_on_is_refused(two: Two, tmp_path: Path) -> None:
    own = without(two, tmp_path, "train", "skip")
    with pytest.raises(DataError, match="no row to train on is in all caches of"):
        own.train(tmp_path / "out")
