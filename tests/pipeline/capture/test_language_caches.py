"""A language model as teacher, from documents to a verified cache of entries for every token."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.config.caches import CacheEntry
from pipeline.config.datasets import Dataset
from pipeline.data.prepare import prepare_dataset
from pipeline.data.rows import load_rows
from pipeline.engines.loading import load_language_model
from pipeline.teachers.record import teacher_reader
from storage import Cache
from storage.errors import AssetError, SpecMismatch, TeacherError
from storage.records import EntryRows
from storage.writer import Store
from tests.pipeline.capture.test_capture import (
    FULL,
    WRONG,
    WriterError,
    check_that_a_writers_error_names_its_shard,
    content,
    no_teacher,
)
from tests.pipeline.prose import Prose, V


@pytest.fixture
def prose(prose: Prose, tmp_path: Path) -> Prose:
    """A copy, to be changed."""
    return Prose.copied(prose.root, tmp_path / "own")


def held(cache: Cache) -> dict[str, EntryRows]:
    """row id -> what the cache holds of it."""
    found = {}
    for shard in cache.shards:
        rows = cache.read(shard)
        assert isinstance(rows, EntryRows)
        for place, row in enumerate(rows.row_ids.to_pylist()):
            found[row] = rows.take(np.array([place]))
    return found


def test_topk_entries_are_those_of_the_live_model_at_every_token(prose: Prose) -> None:
    """Documents do not see each other: each is compared with the model run on it alone."""
    entry = {"codec": "topk", "k": 5, "layout": "plain"}
    chosen = CacheEntry.model_validate(
        {"dataset": "prose", "teacher": "tiny", "targets": entry, "precision": "float32", "shard_rows": 16}
    )
    capture_cache(
        CaptureJob("prose", chosen, prose.dataset, prose.teacher, prose.cache, Store(prose.root / "store"))
    )
    rows, model = load_rows(prose.dataset), load_language_model(prose.teacher, "float32")
    reader, kept = teacher_reader(prose.teacher), held(Cache.open(prose.cache))
    assert kept.keys() == set(rows.row_ids.to_pylist())
    for row, text in list(zip(rows.row_ids.to_pylist(), rows.texts.to_pylist(), strict=True))[:12]:
        ids = torch.from_numpy(reader.read([text], [row]).ids.astype(np.int64))
        with torch.inference_mode():
            probs = torch.softmax(model(ids[None]).logits[0, :, : reader.num_ids], -1)
        own = kept[row]
        assert own.token_ids is not None
        assert own.entropy is not None
        exact = torch.special.entr(probs[:-1].double()).sum()
        assert own.entropy[0] == pytest.approx(exact.item(), rel=1e-4)
        assert own.token_ids.tolist() == ids.tolist()
        assert own.entries.counts.tolist() == [5] * (len(ids) - 1) + [0], "the last token has no target"
        top = probs[:-1].topk(5)
        assert own.entries.weights.reshape(-1, 5) == pytest.approx(top.values.numpy(), abs=1e-5)
        assert (own.entries.ids.reshape(-1, 5) == top.indices.numpy()).mean() > 0.99


def test_ids_past_the_tokenizers_are_padding_and_are_never_kept(prose: Prose) -> None:
    cache = Cache.open(prose.cache)
    vocab = cache.identity.spec.vocab_size
    assert vocab is not None
    assert vocab < V
    assert max(int(rows.entries.ids.max()) for rows in held(cache).values() if len(rows.entries.ids)) < vocab


def test_a_cache_of_a_language_model_is_verified_and_explains_itself(prose: Prose) -> None:
    record, cache = prose.check(), Cache.open(prose.cache)
    assert record["rows"] == 60
    assert cache.identity.spec.task == "causal-lm"
    assert cache.labels == ()
    assert record["positions"] == sum(int(rows.num_tokens.sum()) for rows in held(cache).values())


def test_another_teacher_is_found_by_the_replay(prose: Prose) -> None:
    path = prose.teacher / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "mlp.down_proj" in name)
    save_file(weights | {name: weights[name] * 2}, path, metadata={"format": "pt"})
    with pytest.raises(SpecMismatch, match=r"teacher\.weights"):
        prose.check()
    prose.capture()
    assert prose.check()["rows"] == 60


def test_a_killed_capture_continues_to_the_same_bytes_and_loads_the_teacher_only_where_needed(
    prose: Prose, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(prose.cache)
    shards = sorted((prose.root / "store").rglob("shard.json"))
    shutil.rmtree(shards[1].parent)
    captured = prose.capture()
    assert 0 < captured.computed_rows <= 16
    assert content(prose.cache) == before
    monkeypatch.setattr("pipeline.engines.language_model.load_language_model", no_teacher)
    assert prose.capture().computed_rows == 0


def test_entries_do_not_depend_on_how_rows_were_cut_into_shards(prose: Prose) -> None:
    """Random numbers belong to rows; logits are the same to rounding, whatever else is in the batch."""
    first = held(Cache.open(prose.cache))
    entry = prose.entry().model_copy(update={"shard_rows": 7})
    shutil.rmtree(prose.root / "store")
    capture_cache(
        CaptureJob("prose", entry, prose.dataset, prose.teacher, prose.cache, Store(prose.root / "store"))
    )
    again = held(Cache.open(prose.cache))
    same = [(first[row].entries.ids == again[row].entries.ids).all() for row in first
            if len(first[row].entries.ids) == len(again[row].entries.ids)]  # fmt: skip
    assert len(same) >= 58
    assert np.mean(same) > 0.95


def test_logits_that_are_not_finite_name_row_and_token(prose: Prose) -> None:
    path = prose.teacher / "model.safetensors"
    weights = load_file(path)
    bad = weights["model.embed_tokens.weight"].clone()
    rows, reader = load_rows(prose.dataset), teacher_reader(prose.teacher)
    tokens = reader.read(rows.texts.to_pylist(), rows.row_ids)
    bad[int(tokens.row(5)[4])] = float("nan")
    save_file(weights | {"model.embed_tokens.weight": bad}, path, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"logits for row [0-9a-f]{32}, token \d+, are not finite"):
        prose.capture()


@pytest.mark.parametrize(
    ("writer", "fault"),
    [("storage.records.write_sparse", FULL), ("storage.codecs.Threshold.pack", WRONG)],
    ids=["full", "wrong"],
)
def test_a_writers_error_stops_the_capture(prose: Prose, writer: str, fault: WriterError) -> None:
    check_that_a_writers_error_names_its_shard(prose.capture, prose.root / "store", writer, fault)


def test_a_directory_without_a_model_and_training_are_refused(prose: Prose, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"neither a config\.json nor one \*\.gguf"):
        prose.make_teacher(model=str(tmp_path))
    with pytest.raises(TeacherError, match="taken as they are"):
        prose.make_teacher(train={})


def test_a_model_that_lacks_its_head_is_refused(prose: Prose) -> None:
    path = prose.teacher / "model.safetensors"
    path.unlink()
    model = load_file(prose.root / "model" / "model.safetensors")
    save_file({k: v for k, v in model.items() if k != "lm_head.weight"}, path, metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"lack lm_head\.weight"):
        load_language_model(prose.teacher, "float32")


def test_a_teacher_takes_a_perplexity_and_not_an_accuracy(prose: Prose) -> None:
    record = prose.make_teacher()
    rows, reader = load_rows(prose.dataset), teacher_reader(prose.teacher)
    model = load_language_model(prose.teacher, "float32")
    losses = []
    for index in rows.select("test"):
        ids = torch.from_numpy(reader.read([rows.texts[int(index)].as_py()], ["x"]).ids.astype(np.int64))
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1, : reader.num_ids]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"))
    assert record["reading"]["test"]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


def test_the_number_of_documents_can_be_limited_by_a_stable_hash(prose: Prose, tmp_path: Path) -> None:
    def kept(rows: int) -> set[str]:
        entry = {"task": "causal-lm", "path": str(prose.root / "documents.jsonl"), "rows": rows}
        prepare_dataset("prose", Dataset.model_validate(entry), tmp_path / str(rows))
        return set(load_rows(tmp_path / str(rows)).row_ids.to_pylist())

    assert len(kept(50)) == 50
    assert kept(40) < kept(50)
