"""Growth under real DVC: new rows travel alone; caches are merged and the store cleaned up by hand."""

import os
import shutil
import time
from pathlib import Path

import pytest

from storage import Cache
from tests import toy
from tests.stages.conftest import Project, start
from tests.stages.test_reuse import read_csv, write_csv


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that has its cache, and no student yet."""
    made = start(tmp_path_factory.mktemp("cached") / "project")
    made.repro("cache@toy")
    return made


@pytest.fixture
def project(cached: Project, tmp_path: Path) -> Project:
    """A copy of it."""
    shutil.copytree(cached.root, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


def pushed(project: Project) -> set[str]:
    """What lies in the remote."""
    remote = project.root.parent / "shelf"
    return {path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()}


def test_a_push_of_a_grown_cache_moves_its_new_shard_and_no_other(project: Project) -> None:
    project.run("dvc", "remote", "modify", "shelf", "url", str(project.root.parent / "shelf"))
    project.run("dvc", "push", "caches/toy")
    before, sealed = pushed(project), project.files("caches/toy")
    lines = read_csv(project.root / "reviews.csv")
    known = {line[0] for line in lines}
    new = [text for text in toy.texts(400, seed=7) if text not in known][:20]
    lines += [[text, str(toy.label(text)), "labelled"] for text in new]
    write_csv(project.root / "reviews.csv", lines)
    project.repro("cache@toy")
    grown = project.files("caches/toy")
    made = {name for name in grown if grown[name] != sealed.get(name)}
    shards = {name.split("/")[1].removesuffix(".parquet") for name in made - {"manifest.json"}}
    assert len(shards) == 1
    told = project.run("dvc", "push", "caches/toy")
    # Each file that is not the same as another one is an object; the list of the directory is one more.
    objects = {grown[name] for name in made} - set(sealed.values())
    assert len(pushed(project) - before) == len(objects) + 1
    assert f"{len(objects) + 1} files pushed" in told.stdout


def test_gc_shows_and_removes_what_a_changed_spec_left_behind(project: Project) -> None:
    entry = toy.params()["caches"]["toy"]
    old = set(project.shards())
    project.params(caches={"toy": entry | {"hidden": {"layers": [0]}}})
    project.repro("cache@toy")
    for path in old:
        os.utime(path, (time.time() - 10**6,) * 2)
    command = ["python", "-m", "stages.main", "gc"]
    shown = project.run(*command).stdout
    assert f"{len(old)} unused: 180 rows, " in shown
    assert "remove them with --yes" in shown
    assert old < set(project.shards())
    project.run(*command, "--yes")
    assert not old & set(project.shards())
    project.params(workers={"store": str(project.root.parent / "nfs")})
    shown = project.run(*command).stdout
    assert f"{project.root.parent / 'nfs'} is left alone" in shown
    assert "0 unused" in shown
    sealed = Cache.open(project.root / "caches" / "toy")
    assert len(project.shards()) == len(sealed.shards)

    shutil.rmtree(sealed.path)  # as a killed capture leaves it
    refused = project.run(*command, "--yes", "--keep-hours", "0", check=False)
    assert refused.returncode == 1
    assert "ConfigError: caches.toy was finished once and is not in caches/" in refused.stderr
    assert len(project.shards()) == len(sealed.shards)


def test_merged_caches_are_one_cache_that_the_next_capture_goes_on_from(
    project: Project, tmp_path: Path
) -> None:
    shutil.copytree(project.root / "caches" / "toy", tmp_path / "elsewhere")
    command = ["python", "-m", "stages.main", "merge", str(tmp_path / "elsewhere"), "caches/toy"]
    shutil.rmtree(project.root / ".stillroom")
    project.params(workers={"store": str(tmp_path / "nfs")})  # what merging makes goes where captures look
    said = project.run(*command, "--into", str(tmp_path / "both")).stdout
    assert "180 rows in" in said
    assert "180 rows were in several" in said
    assert list((tmp_path / "nfs").rglob("*.parquet"))
    assert not project.shards()
    assert Cache.open(tmp_path / "both").shards == Cache.open(tmp_path / "elsewhere").shards
    assert (
        "180 of 180 rows are captured already"
        in project.repro("--force", "--single-item", "cache@toy").output
    )
    again = project.run(*command, "--into", "caches/toy", check=False)
    assert again.returncode == 1
    assert "ConfigError: caches/toy exists already" in again.stderr
