"""The store: finished shards are whole or not there, also after kills; sealing is a pure function."""

import multiprocessing as mp
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from storage import Cache
from storage.disk import STALE_SECONDS, host_name, sweep_stale
from storage.errors import StoreFull
from storage.seal import SealedParts, seal
from storage.verify import verify
from storage.writer import Store
from tests.storage.conftest import HIDDEN, IDENTITY, fill, make_rows, make_states

ROOT = Path(__file__).parents[2]


def digest_tree(root: Path) -> dict[str, bytes]:
    """Every file below root with its bytes."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_what_was_put_is_found_again_largest_first(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shards = fill(store, (3, 5))
    assert store.finished(IDENTITY) == shards[::-1]
    assert store.finished(IDENTITY)[0].row_ids().to_pylist() == make_rows(3, 5).row_ids.to_pylist()
    assert not list((tmp_path / "tmp").iterdir())


def test_another_identity_sees_none_of_them(tmp_path: Path) -> None:
    fill(Store(tmp_path))
    assert Store(tmp_path).finished(IDENTITY.model_copy(update={"capture_version": 2})) == []


def test_the_same_shard_has_the_same_bytes_from_any_writer(tmp_path: Path) -> None:
    for name in ("one", "two"):
        fill(Store(tmp_path / name))
    assert digest_tree(tmp_path / "one") == digest_tree(tmp_path / "two")


def _put(root: Path) -> None:
    rows = make_rows(0, 50)
    Store(root).put(IDENTITY, rows, make_states(rows), 1.0)


def test_a_shard_that_several_processes_finish_at_once_is_there_once(tmp_path: Path) -> None:
    workers = [mp.get_context("fork").Process(target=_put, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(Store(tmp_path).finished(IDENTITY)) == 1
    assert not list((tmp_path / "tmp").iterdir())


def test_a_damaged_shard_is_dropped_and_the_others_are_kept(tmp_path: Path) -> None:
    first, second = fill(Store(tmp_path))
    path = first.root / first.entry.logits_path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert Store(tmp_path).finished(IDENTITY) == [second]
    assert not first.root.exists()


def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store._aside() as living:
        dead = living.with_name(living.name.replace(str(os.getpid()), "999999999"))
        dead.mkdir()
        store.sweep()
        assert living.is_dir()
        assert not dead.exists()


def test_sweeping_removes_what_is_a_day_old_and_accepts_what_is_gone(tmp_path: Path) -> None:
    store, temporary = Store(tmp_path), tmp_path / "tmp"
    (temporary / "elsewhere.1.x").mkdir(parents=True)
    for name in ("elsewhere.2.x", "nobody"):
        (temporary / name).write_bytes(b"half a file")
    store.sweep()
    assert len(list(temporary.iterdir())) == 3, "machines elsewhere may still be writing"
    for path in temporary.iterdir():
        os.utime(path, (0, time.time() - STALE_SECONDS - 60))
    store.sweep()
    assert not list(temporary.iterdir())
    sweep_stale(temporary / "elsewhere.3.x", "elsewhere", "3")


KILL = """
import os, signal, sys
from pathlib import Path
from storage.writer import Store
from tests.storage.conftest import IDENTITY, make_rows, make_states
calls = 0
def deadly(real):
    def call(*arguments):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call
os.fsync, os.rename, os.mkdir = deadly(os.fsync), deadly(os.rename), deadly(os.mkdir)
rows = make_rows(0, 9)
Store(Path(sys.argv[1])).put(IDENTITY, rows, make_states(rows), 1.0)
print(calls)
"""


def test_kill_9_at_any_step_of_a_write_leaves_a_whole_shard_or_none(tmp_path: Path) -> None:
    fill(Store(tmp_path / "undisturbed"), (9,))

    def run(root: Path, step: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILL, str(root), str(step)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    steps = int(run(tmp_path / "count", 10**6).stdout)
    assert steps > 10
    for step in [1, 2, steps // 2, *range(steps - 3, steps + 1)]:
        root = tmp_path / str(step)
        assert run(root, step).returncode == -signal.SIGKILL
        store = Store(root)
        assert len(store.finished(IDENTITY)) in (0, 1)
        store.sweep()
        fill(store, (9,))
        assert digest_tree(root) == digest_tree(tmp_path / "undisturbed")


def _put_on_a_full_disk(root: Path, limit: int, queue: "mp.Queue[str]") -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # the kernel ends every file there
    try:
        rows = make_rows(5, 30_000)
        Store(root).put(IDENTITY, rows, make_states(rows), 1.0)
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")
    else:
        queue.put("no error")


@pytest.mark.parametrize("limit", [1000, 100_000])
def test_a_full_disk_is_one_clear_error_and_keeps_what_is_finished(tmp_path: Path, limit: int) -> None:
    before = fill(Store(tmp_path), (5,))
    context = mp.get_context("fork")
    queue: mp.Queue[str] = context.Queue()
    child = context.Process(target=_put_on_a_full_disk, args=(tmp_path, limit, queue))
    child.start()
    message = queue.get(timeout=60)
    child.join()
    assert message.startswith(f"{StoreFull.__name__}: no space left")
    assert "Finished shards are kept" in message
    assert Store(tmp_path).finished(IDENTITY) == before
    assert not list((tmp_path / "tmp").iterdir())


def test_states_that_do_not_fit_float16_are_refused_and_not_kept_as_infinity(tmp_path: Path) -> None:
    rows = make_rows(0, 2)
    states = make_states(rows)
    states["layer.2"][1, 3] = 1e6
    with pytest.raises(ValueError, match=r"layer\.2 do not fit float16"):
        Store(tmp_path).put(IDENTITY, rows, states, 1.0)


def test_sealing_depends_on_its_arguments_alone_and_replaces_what_was_there(tmp_path: Path) -> None:
    shards = fill(Store(tmp_path / "store"))
    seal(tmp_path / "a" / "toy", SealedParts(IDENTITY, shards, {"tokenizer.json": b"1"}, {}))
    time.sleep(0.01)
    seal(tmp_path / "b" / "toy", SealedParts(IDENTITY, shards, {"tokenizer.json": b"1"}, {}))
    assert digest_tree(tmp_path / "a") == digest_tree(tmp_path / "b")
    seal(tmp_path / "a" / "toy", SealedParts(IDENTITY, shards[:1], {"tokenizer.json": b"1"}, {}))
    assert verify(Cache.open(tmp_path / "a" / "toy")).rows == 5


def _seal_often(root: Path) -> None:
    shards = Store(root / "store").finished(IDENTITY)
    for _ in range(20):
        seal(root / "toy", SealedParts(IDENTITY, shards, {"tokenizer.json": b"1"}, {}))


def test_several_processes_may_seal_one_cache_at_once(tmp_path: Path) -> None:
    fill(Store(tmp_path / "store"))
    workers = [mp.get_context("fork").Process(target=_seal_often, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert verify(Cache.open(tmp_path / "toy")).rows == 8
    assert {path.name for path in tmp_path.iterdir()} == {"store", "toy"}


def test_sealing_sweeps_what_a_dead_process_left_and_not_what_a_living_one_makes(tmp_path: Path) -> None:
    shards = fill(Store(tmp_path / "store"))
    dead = tmp_path / f".toy.{host_name()}.999999999"
    other = tmp_path / f".toy.b.{host_name()}.{os.getpid()}"  # of the cache toy.b
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie, as in many containers
    zombie, its_old = (tmp_path / f".toy.{host_name()}.{ended.pid}{tail}" for tail in ("", "-replaced"))
    theirs = tmp_path / f".toy.{host_name()}.{os.getppid()}-replaced"
    for made in (dead, other, zombie, its_old, theirs):
        (made / "logits").mkdir(parents=True)
    seal(tmp_path / "toy", SealedParts(IDENTITY, shards, {}, {}))
    ended.wait()
    assert other.is_dir()
    assert theirs.is_dir()
    assert not dead.exists()
    assert not zombie.exists()
    assert not its_old.exists()


def test_sealing_copies_where_links_are_not_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "links are not allowed here")

    shards = fill(Store(tmp_path / "store"))
    monkeypatch.setattr(os, "link", refuse)
    seal(tmp_path / "toy", SealedParts(IDENTITY, shards, {}, {}))
    assert verify(Cache.open(tmp_path / "toy")).rows == 8


def test_hidden_states_come_back_as_they_were_rounded(cache: Cache) -> None:
    shard = cache.shards[1]
    rows = make_rows(5, 3)
    assert cache.hidden_names == ("layer.1", "layer.2")
    for name, states in make_states(rows).items():
        assert cache.hidden(shard, name).dtype == np.float32
        assert np.array_equal(cache.hidden(shard, name), states.astype(HIDDEN.dtype))
    with pytest.raises(ValueError, match=r"has the hidden states \[.*\], not layer\.3"):
        cache.hidden(shard, "layer.3")
