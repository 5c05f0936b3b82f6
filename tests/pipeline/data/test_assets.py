"""Fetching: digests are compared, nothing unsafe is unpacked, and a failure leaves nothing behind."""

import hashlib
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.config.datasets import Asset
from pipeline.data.assets import fetch_asset, unpack_wheel
from storage.errors import AssetError, ConfigError


def write_wheel(path: Path, members: dict[str, str]) -> str:
    """A wheel with these files; returns its sha256."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def package(sha256: str | None, path: str = "pack/data") -> Asset:
    return Asset(source="pypi:pack==1.0", sha256=sha256, path=path)


def test_a_wheel_is_unpacked_below_the_path_that_is_asked_for(tmp_path: Path) -> None:
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    digest = write_wheel(wheel, {"pack/data/a.csv": "1", "pack/data/deep/b.csv": "2", "pack/code.py": "3"})
    unpack_wheel("x", package(digest), wheel, tmp_path / "out")
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert found == ["a.csv", "deep/b.csv"]


def test_another_digest_stops_with_both_digests_and_unpacks_nothing(tmp_path: Path) -> None:
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    digest = write_wheel(wheel, {"pack/data/a.csv": "1"})
    with pytest.raises(AssetError) as refused:
        unpack_wheel("x", package("0" * 64), wheel, tmp_path / "out")
    assert digest in str(refused.value)
    assert "0" * 64 in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_package_without_a_digest_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    write_wheel(wheel, {"pack/data/a.csv": "1"})
    with pytest.raises(AssetError, match="expected none is given"):
        unpack_wheel("x", package(None), wheel, tmp_path / "out")


@pytest.mark.parametrize("member", ["pack/data/../../../escaped", "pack/data/../escaped"])
def test_a_path_that_leaves_the_output_is_refused(tmp_path: Path, member: str) -> None:
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    digest = write_wheel(wheel, {member: "gotcha"})
    with pytest.raises(AssetError, match="refused"):
        unpack_wheel("x", package(digest), wheel, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("member", ["../escaped", "/escaped-from-stillroom"])
def test_a_path_outside_the_package_never_gets_out(tmp_path: Path, member: str) -> None:
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    digest = write_wheel(wheel, {member: "gotcha", "good": "yes"})
    with pytest.raises(AssetError, match="refused"):
        unpack_wheel("x", package(digest, path=""), wheel, tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("escaped*"))
    assert not Path("/escaped-from-stillroom").exists()


def test_a_package_that_cannot_be_had_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        AssetError, match=r"assets\.x: pack==1\.0 could not be downloaded.*No matching"
    ) as refused:
        fetch_asset("x", package("0" * 64), tmp_path / "out")
    assert "Traceback" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_package_comes_from_an_index_of_wheels_and_replaces_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index").mkdir()
    metadata = "Metadata-Version: 2.1\nName: pack\nVersion: 1.0\n"
    about = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    digest = write_wheel(
        tmp_path / "index" / "pack-1.0-py3-none-any.whl",
        {
            "pack/data/a.csv": "1",
            "pack-1.0.dist-info/METADATA": metadata,
            "pack-1.0.dist-info/WHEEL": about,
            "pack-1.0.dist-info/RECORD": "",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(AssetError, match="is not the file in params"):
        fetch_asset("x", package("0" * 64), out)
    assert [path.name for path in out.iterdir()] == ["old"], "a failure keeps what was there"
    fetch_asset("x", package(digest), out)
    assert [path.name for path in out.iterdir()] == ["a.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "out"]


def test_source_packages_are_never_taken_because_pip_would_run_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "pack-1.0"
    source.mkdir()
    (source / "backend.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('code ran')\n")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tmp_path / "index").mkdir()
    with tarfile.open(tmp_path / "index" / "pack-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "pack-1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(AssetError, match="as a wheel"):
        fetch_asset("x", package("0" * 64), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["pypi:pack", "pypi:pack==1==2"])
def test_a_package_without_a_version_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ConfigError, match="expected pypi:NAME==VERSION"):
        fetch_asset("x", Asset(source=source, sha256="0" * 64), tmp_path / "out")


def test_a_local_file_or_directory_is_copied(tmp_path: Path) -> None:
    (tmp_path / "from" / "deep").mkdir(parents=True)
    (tmp_path / "from" / "deep" / "a.csv").write_text("1")
    fetch_asset("x", Asset(source=str(tmp_path / "from"), path="deep"), tmp_path / "out")
    assert (tmp_path / "out" / "a.csv").read_text() == "1"
    fetch_asset("x", Asset(source=str(tmp_path / "from" / "deep" / "a.csv")), tmp_path / "file")
    assert (tmp_path / "file" / "a.csv").read_text() == "1"


def test_an_empty_or_missing_part_of_a_local_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "from" / "empty").mkdir(parents=True)
    for path, message in (("empty", "has nothing below 'empty'"), ("none", "does not exist")):
        with pytest.raises(AssetError, match=message):
            fetch_asset("x", Asset(source=str(tmp_path / "from"), path=path), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_a_hub_that_does_not_answer_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="the hub did not return it") as refused:
        fetch_asset("x", Asset(source="nobody/nothing"), tmp_path / "out")
    assert "hub id" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_path_inside_a_hub_repository_becomes_the_asset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo: str, *, local_dir: Path, **options: object) -> None:
        assert (repo, options["repo_type"], options["allow_patterns"]) == ("owner/name", "dataset", "data/*")
        (local_dir / "data").mkdir()
        (local_dir / "data" / "a.csv").write_text("1")
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    fetch_asset("x", Asset(source="datasets/owner/name", path="data"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
