"""CachedDataset: the batches of a run as plain tensors, for any ranks and workers, from any place on."""

import copy
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from pipeline.data.inputs import read_inputs
from pipeline.data.rows import NO_LABEL, POOL, load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.losses.sparse import SparseTargets
from pipeline.streaming import documents, rows
from pipeline.streaming.batch import DistillBatch
from pipeline.streaming.dataset import CachedDataset
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.plain_batch import PlainBatch
from pipeline.streaming.rows import CachedRows
from storage import Cache
from storage.errors import ConfigError
from storage.mixture import open_cache
from tests.pipeline.conftest import World
from tests.pipeline.prose import Prose


@pytest.fixture(autouse=True)
def _several_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "SHARDS_PER_WINDOW", 2)
    monkeypatch.setattr(documents, "SHARDS_PER_WINDOW", 2)


@pytest.fixture(params=["rows", "documents"])
def arguments(request: pytest.FixtureRequest, world: World, prose: Prose) -> dict[str, Any]:
    """What a dataset of rows, and one of documents, is made with."""
    if request.param == "documents":
        return {"cache": prose.cache, "rows": prose.dataset, "batch_tokens": 40, "max_length": 9, "seed": 3}
    made = {"cache": world.cache, "rows": world.dataset, "batch_size": 7, "seed": 3, "pool": True}
    return made | {"hidden": ("layer.1",)}


def flat(batch: PlainBatch, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a batch by their path."""
    found = {}
    for key, value in batch.items():
        found |= flat(value, f"{name}{key}.") if isinstance(value, dict) else {f"{name}{key}": value}
    return found


def same(some: Iterable[PlainBatch], others: Iterable[PlainBatch]) -> bool:
    """Whether both are the same batches, bit for bit. Raises ValueError where one has more."""
    return all(
        flat(one).keys() == flat(other).keys()
        and all(torch.equal(tensor, flat(other)[name]) for name, tensor in flat(one).items())
        for one, other in zip(some, others, strict=True)
    )


def stream_of(arguments: dict[str, Any]) -> CachedRows | CachedDocuments:
    """The same rows as a run reads them."""
    cache, some = open_cache(Path(arguments["cache"])), load_rows(Path(arguments["rows"]))
    splits = ("train", POOL) if arguments.get("pool") else ("train",)
    if "batch_tokens" in arguments:
        return CachedDocuments(cache, some, splits, arguments["max_length"])
    some = some.only("validation", *splits)
    reader = TextReader(cache.tokenizer_dir, 128, "truncate")
    tokens = read_inputs(reader, some)
    return CachedRows(cache, some, tokens, reader.pad_id, splits, arguments.get("hidden", ()))


def check_plain(plain: PlainBatch, batch: DistillBatch) -> None:
    """The plain batch holds what the batch of a run holds."""
    assert torch.equal(plain["input_ids"], batch.inputs["input_ids"])
    assert torch.equal(plain["attention_mask"], batch.mask.long())
    targets, per_token = plain["targets"], "mask" in plain["targets"]
    labels = plain["labels"][targets["mask"]] if per_token else plain["labels"]
    assert torch.equal(labels.masked_fill(labels == -100, NO_LABEL), batch.labels_T)
    if isinstance(batch.teacher, SparseTargets):
        for name in ("positions", "ids", "weights"):
            assert torch.equal(targets[name], getattr(batch.teacher, name))
    else:
        assert torch.equal(targets["logits"], batch.teacher)
    assert targets.get("hidden", {}).keys() == batch.hidden.keys()
    for name, states in batch.hidden.items():
        assert torch.equal(targets["hidden"][name], states)


def test_its_batches_are_those_of_a_run_with_the_same_seed_and_sizes(arguments: dict[str, Any]) -> None:
    data, run = CachedDataset(**arguments), stream_of(arguments)
    size = arguments.get("batch_tokens") or arguments["batch_size"]
    for epoch in range(2):
        assert data.epoch == epoch
        batches = list(run.epoch(3, epoch, size))
        assert len(data) == len(batches) > 4
        for plain, batch in zip(data, batches, strict=True):
            check_plain(plain, batch)
    assert data.num_steps(2) >= len(batches) * 2


def test_labels_of_tokens_are_the_next_tokens_and_padding_has_none(prose: Prose) -> None:
    data = CachedDataset(prose.cache, prose.dataset, batch_tokens=64, max_length=9)
    for batch in data:
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
        assert torch.equal(mask, batch["targets"]["mask"])
        assert (labels[~mask] == -100).all()
        inside = mask[:, 1:]
        assert torch.equal(labels[:, :-1][inside], ids[:, 1:][inside])
        assert torch.equal(batch["shift_labels"], labels)


def test_a_model_of_transformers_reads_a_batch_as_it_is_and_does_not_shift_it_twice(prose: Prose) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(prose.root / "model", trust_remote_code=False)
    batch = next(iter(CachedDataset(prose.cache, prose.dataset, batch_tokens=64, max_length=9)))
    batch.pop("targets")
    out = model(**batch)
    mask = batch["labels"] != -100
    expected = torch.nn.functional.cross_entropy(out.logits[mask], batch["labels"][mask])
    torch.testing.assert_close(out.loss, expected)


def test_rows_without_a_label_have_minus_100(world: World) -> None:
    data = CachedDataset(world.cache, world.dataset, split="pool")
    assert all((batch["labels"] == -100).all() and batch["labels"].dtype == torch.int64 for batch in data)


def test_iterating_again_gives_the_next_epoch_and_set_epoch_any(arguments: dict[str, Any]) -> None:
    data = CachedDataset(**arguments)
    first, second = list(data), list(data)
    assert not same(first[:2], second[:2])
    assert data.epoch == 2
    data.set_epoch(1)
    assert same(data, second)
    data.set_epoch(0)
    assert same(data, first)


def test_the_epoch_is_over_with_its_last_batch_and_not_only_when_another_is_requested(
    arguments: dict[str, Any],
) -> None:
    """A trainer takes as many batches as there are and asks for no more."""
    data = CachedDataset(**arguments)
    batches = iter(data)
    for _ in range(len(data)):
        next(batches)
    assert (data.epoch, data.state_dict()["batch"]) == (1, 0)


def test_several_epochs_in_one_iteration_are_the_same_batches(arguments: dict[str, Any]) -> None:
    one = CachedDataset(**arguments)
    apart = [batch for _ in range(3) for batch in one]
    data = CachedDataset(**arguments, epochs=3)
    assert len(data) == len(apart)
    assert same(data, apart)
    assert data.epoch == 3
    data = CachedDataset(**arguments, epochs=3)
    batches = iter(data)
    first = [next(batches) for _ in range(len(one) + 2)]
    state = data.state_dict()
    assert state["epoch"] == 1
    data = CachedDataset(**arguments, epochs=3)
    data.load_state_dict(state)
    assert same([*first, *data], apart)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_go_on_taking_turns_over_several_epochs(arguments: dict[str, Any], workers: int) -> None:
    data = CachedDataset(**arguments, epochs=3)
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    assert same(loader, CachedDataset(**arguments, epochs=3))


def test_an_iteration_that_was_left_starts_the_epoch_again(arguments: dict[str, Any]) -> None:
    data = CachedDataset(**arguments)
    first = [batch for batch, _ in zip(data, range(3), strict=False)]
    assert same(first, list(data)[:3])


def test_it_continues_from_a_state_in_the_middle_of_an_epoch_twice_in_a_row(
    arguments: dict[str, Any],
) -> None:
    whole = [*CachedDataset(**arguments)]
    later = CachedDataset(**arguments)
    later.set_epoch(1)
    state, seen = None, []
    for stop in (2, 3, len(whole) - 5):
        data = CachedDataset(**arguments)
        if state is not None:
            data.load_state_dict(json.loads(json.dumps(state)))
        data.set_epoch(0)  # as loops do at the start of an epoch: it changes nothing
        batches = iter(data)
        seen += [next(batches) for _ in range(stop)]
        state = data.state_dict()
    assert state is not None
    assert state["batch"] == len(whole) or state["epoch"] == 1
    assert same(seen, whole)
    data = CachedDataset(**arguments)
    data.load_state_dict(state)
    assert same(data, later)


def test_shards_before_the_state_are_not_read(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CachedDataset(**arguments)
    decoded: list[int] = []
    cached_read = Cache.read
    monkeypatch.setattr(Cache, "read", lambda self, shard: decoded.append(1) or cached_read(self, shard))
    last = len(list(data)) - 1
    everything = len(decoded)
    data.load_state_dict({**data.state_dict(), "epoch": 0, "batch": last})
    decoded.clear()
    assert len(list(data)) == 1
    assert 0 < len(decoded) < everything


@pytest.mark.parametrize("change", ["seed", "batch_size", "max_length", "pool"])
def test_a_state_of_batches_in_another_order_is_refused(world: World, change: str) -> None:
    data = CachedDataset(world.cache, world.dataset)
    other = CachedDataset(world.cache, world.dataset, **{change: True if change == "pool" else 5})
    with pytest.raises(ConfigError, match=f"(?s)another order.*{change}: "):
        other.load_state_dict(data.state_dict())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_of_a_loader_give_the_same_batches_in_the_same_order(
    arguments: dict[str, Any], workers: int
) -> None:
    data = CachedDataset(**arguments)
    whole = list(data)
    data.set_epoch(0)
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    assert len(loader) == len(whole)
    assert same(loader, whole)
    data.load_state_dict(data.state_dict(batch=3))
    assert same(loader, whole[3:])
    data.set_epoch(1)
    alone = CachedDataset(**arguments)
    alone.set_epoch(1)
    assert same(loader, alone)


def test_a_worker_that_is_started_and_not_forked_opens_the_cache_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # it has none of this process's patches
    data = CachedDataset(world.cache, world.dataset)
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert same(loader, CachedDataset(world.cache, world.dataset))


def test_a_copy_stands_where_the_dataset_stood(arguments: dict[str, Any]) -> None:
    data = CachedDataset(**arguments)
    data.load_state_dict(data.state_dict(batch=2))
    rest = list(data)
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert twin.epoch == 1
        twin.load_state_dict({**twin.state_dict(), "epoch": 0, "batch": 2})
        assert same(twin, rest)


def test_workers_that_stay_go_on_to_the_next_epoch(arguments: dict[str, Any]) -> None:
    data = CachedDataset(**arguments)
    loader = DataLoader(data, batch_size=None, num_workers=2, persistent_workers=True)
    assert same([*loader, *loader], [*data, *data])


def test_with_workers_the_state_needs_the_number_of_batches(arguments: dict[str, Any]) -> None:
    data = CachedDataset(**arguments)
    assert data.state_dict()["batch"] == 0
    list(DataLoader(data, batch_size=None, num_workers=1))
    with pytest.raises(ConfigError, match="workers of a DataLoader read ahead"):
        data.state_dict()
    assert data.state_dict(batch=2)["batch"] == 2


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_share_every_batch_and_repeat_nothing(arguments: dict[str, Any], num_ranks: int) -> None:
    whole = CachedDataset(**arguments)
    ranks = [CachedDataset(**arguments, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert {len(data) for data in ranks} == {len(whole)}
    for batch, *parts in zip(whole, *ranks, strict=True):
        counted = [part for part in parts if part["targets"]["shares"][0] > 0]
        assert sum(len(part["input_ids"]) for part in counted) == len(batch["input_ids"])
        rows_of = [
            row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        own = [
            row[mask.bool()]
            for part in counted
            for row, mask in zip(part["input_ids"], part["attention_mask"], strict=True)
        ]
        assert all(torch.equal(one, other) for one, other in zip(own, rows_of, strict=True))
        shares = torch.stack([part["targets"]["shares"] for part in parts])
        labelled = bool((batch["labels"] != -100).any())
        torch.testing.assert_close(shares.sum(0), torch.tensor([num_ranks, num_ranks * labelled]).double())


def test_ranks_are_those_of_torchrun_where_none_are_given(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CachedDataset(**arguments)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert same(data, CachedDataset(**arguments, rank=1, num_ranks=2))


def test_ranks_of_torch_distributed_come_before_those_of_torchrun(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CachedDataset(**arguments)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert same(data, CachedDataset(**arguments, rank=1, num_ranks=2))


def test_one_rank_without_their_number_is_refused(world: World) -> None:
    with pytest.raises(ConfigError, match="rank and num_ranks"):
        CachedDataset(world.cache, world.dataset, rank=1)
    with pytest.raises(ConfigError, match="rank: 2, expected 0 to 1"):
        CachedDataset(world.cache, world.dataset, rank=2, num_ranks=2)


def test_accelerate_moves_every_tensor_of_a_batch(arguments: dict[str, Any]) -> None:
    batch = next(iter(CachedDataset(**arguments)))
    moved = send_to_device(batch, "meta")
    assert {tensor.device.type for tensor in flat(moved).values()} == {"meta"}
    assert flat(moved).keys() == flat(batch).keys()
