"""Local copies: the limit holds, the least recently used goes first, any number of processes share them."""

import errno
import hashlib
import multiprocessing as mp
import os
import random
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from storage import local_copies
from storage.errors import ShardMissing, StoreFull
from storage.local_copies import Fetch, LocalCopies
from storage.manifest import FileEntry

SIZE = 1000


def piece(number: int) -> list[FileEntry]:
    """A piece of one file; its content is its number, over and over."""
    return [
        FileEntry(path=f"logits/{number}", bytes=SIZE, sha256=hashlib.sha256(content(number)).hexdigest())
    ]


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def fetch(file: FileEntry, root: Path) -> None:
    target = root / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content(int(target.name)))


def fail(file: FileEntry, root: Path) -> None:
    raise AssertionError(f"{file.path} is fetched again")


def read(copies: LocalCopies, number: int, how: Fetch = fetch) -> bytes:
    with copies.holding(piece(number), how) as root:
        return (root / f"logits/{number}").read_bytes()


def there(root: Path) -> list[int]:
    return sorted(int(path.name) for path in root.rglob("*") if path.parent.name == "logits")


def test_a_piece_is_fetched_once_and_the_least_recently_used_is_given_up(tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path, 3 * SIZE)
    for number in (1, 2, 3):
        assert read(copies, number) == content(number)
    for age, number in enumerate((2, 3)):  # as if they were used long ago, 2 before 3
        (path,) = (p.parents[1] for p in tmp_path.rglob(f"logits/{number}"))
        os.utime(path, (age, age))
    assert read(copies, 2, fail) == content(2)
    read(copies, 4)
    assert there(tmp_path) == [1, 2, 4]


def test_without_a_limit_nothing_is_given_up(tmp_path: Path) -> None:
    for number in range(9):
        read(LocalCopies(tmp_path), number)
    assert there(tmp_path) == list(range(9))


def test_what_is_held_is_not_given_up_and_no_room_at_all_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copies, "WAIT_SECONDS", 0.0)
    copies = LocalCopies(tmp_path, 2 * SIZE)
    with copies.holding(piece(1), fetch) as held:
        for number in (2, 3, 2):
            read(copies, number)
        assert (held / "logits/1").read_bytes() == content(1)
        with copies.holding(piece(2), fetch), pytest.raises(StoreFull, match=r"no room for 1,000 bytes"):
            read(copies, 3)
    assert read(copies, 3) == content(3)


def test_a_piece_that_could_not_be_fetched_leaves_nothing(tmp_path: Path) -> None:
    def missing(file: FileEntry, root: Path) -> None:
        fetch(file, root)
        raise ShardMissing("not there")

    def full(file: FileEntry, root: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ShardMissing, match="not there"):
        read(LocalCopies(tmp_path, SIZE), 1, missing)
    with pytest.raises(StoreFull, match="no space left while writing"):
        read(LocalCopies(tmp_path, SIZE), 1, full)
    assert there(tmp_path) == []
    assert read(LocalCopies(tmp_path, SIZE), 1) == content(1)


def _read_many(root: Path, seed: int, send_to: Connection) -> None:
    """Read pieces in a random order; send whether each was right, and how many were fetched."""
    fetched, chosen = 0, random.Random(seed)

    def counted(file: FileEntry, root: Path) -> None:
        nonlocal fetched
        fetched += 1
        fetch(file, root)
        parts = [path for path in root.parent.iterdir() if path.is_dir()]
        assert len(parts) <= 3, "the limit holds while something is on its way"

    copies = LocalCopies(root, 3 * SIZE)
    right = all(read(copies, n, counted) == content(n) for n in chosen.choices(range(8), k=40))
    send_to.send((right, fetched))


def start(target: Callable[..., None], *arguments: object) -> tuple[mp.Process, Connection]:
    """A process that runs `target`, and the connection that it sends to."""
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    return process, receiver


def test_several_processes_share_a_limit_that_has_no_room_for_all_of_them(tmp_path: Path) -> None:
    workers = [start(_read_many, tmp_path, seed) for seed in range(5)]
    assert [pipe.recv()[0] for _, pipe in workers] == [True] * 5
    for process, _ in workers:
        process.join()
    assert len(there(tmp_path)) <= 3


def _read_one(root: Path, send_to: Connection) -> None:
    fetched = []
    read(LocalCopies(root), 1, lambda file, below: (fetched.append(1), fetch(file, below))[1])
    send_to.send(len(fetched))


def test_a_piece_that_all_want_at_once_is_fetched_by_one(tmp_path: Path) -> None:
    workers = [start(_read_one, tmp_path) for _ in range(4)]
    assert sum(pipe.recv() for _, pipe in workers) == 1
    for process, _ in workers:
        process.join()


def test_what_another_fetches_is_waited_for_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copies, "WAIT_SECONDS", 0.0)

    def asked_meanwhile(file: FileEntry, root: Path) -> None:
        fetch(file, root)
        with pytest.raises(StoreFull, match="all copies have been in use"):
            read(LocalCopies(tmp_path), 1, fail)

    assert read(LocalCopies(tmp_path), 1, asked_meanwhile) == content(1)


def _die(root: Path, send_to: Connection) -> None:
    def deadly(file: FileEntry, below: Path) -> None:
        fetch(file, below)
        send_to.send(0)
        os.kill(os.getpid(), signal.SIGKILL)

    read(LocalCopies(root, SIZE), 1, deadly)


@pytest.mark.parametrize("wanted", [1, 2])
def test_the_room_of_a_killed_process_is_free_again_and_its_half_piece_is_never_read(
    tmp_path: Path, wanted: int
) -> None:
    process, pipe = start(_die, tmp_path)
    assert pipe.recv() == 0
    process.join()
    assert there(tmp_path) == [1]
    assert read(LocalCopies(tmp_path, SIZE), wanted) == content(wanted)
    assert there(tmp_path) == [wanted]


def test_what_is_damaged_is_dropped_though_it_is_held(tmp_path: Path) -> None:
    copies = LocalCopies(tmp_path)
    with copies.holding(piece(1), fetch):
        copies.drop(piece(1))
    assert there(tmp_path) == []
