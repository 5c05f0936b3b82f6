"""A directory that is replaced is the old one or the new one, whole."""

import os
from pathlib import Path

import pytest

from storage.disk import host_name, replaced_directory


def content(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_a_new_directory_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replaced_directory(tmp_path / "below" / "out") as aside:
            (aside / "a").mkdir()
            (aside / "a" / "file").write_text(text)
            before = content(tmp_path / "below" / "out")
        assert before == ({} if text == "old" else {"a/file": "old"})
        assert content(tmp_path / "below") == {"out/a/file": text}


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("old")
    with pytest.raises(FileNotFoundError), replaced_directory(tmp_path / "out") as aside:
        (aside / "file").write_text((tmp_path / "missing").read_text())
    assert content(tmp_path) == {"out/file": "old"}


def test_what_dead_writers_left_goes_and_what_living_ones_write_stays(tmp_path: Path) -> None:
    dead, living = (tmp_path / f".out.{host_name()}.{pid}" for pid in (999_999_999, os.getppid()))
    for path in (dead, living):
        path.mkdir()
    with replaced_directory(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", living.name])
