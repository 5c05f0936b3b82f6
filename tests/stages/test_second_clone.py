"""A second machine that has the cache and never the teacher."""

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import toy
from tests.s3 import BUCKET, Server
from tests.stages.conftest import Project, start

NEW = toy.params()["runs"] | {
    "new-kd-pool": {"dataset": "toy", "cache": "toy", "seeds": [0], "student": "new", "recipe": "kd-pool"}
}
STUDENTS = toy.params()["students"] | {"new": {"kind": "fc", "embedding": 4, "hidden": 4}}


def with_assets(**changes: object) -> dict[str, object]:
    """Params whose model and data come through assets, from a directory that only the first machine has."""
    base = toy.params()
    return {
        "assets": {"model": {"source": "sources/model"}, "reviews": {"source": "sources/reviews.csv"}},
        "teachers": {"tiny": base["teachers"]["tiny"] | {"model": "assets/model"}},
        "datasets": {"toy": base["datasets"]["toy"] | {"path": "assets/reviews", "files": "reviews.csv"}},
        **changes,
    }


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The first machine: everything done, pushed and committed."""
    project = start(tmp_path_factory.mktemp("first") / "project", **with_assets())
    (project.root / "sources").mkdir()
    shutil.move(project.root / "model", project.root / "sources" / "model")
    shutil.move(project.root / "reviews.csv", project.root / "sources" / "reviews.csv")
    project.repro()
    project.run("dvc", "push")
    project.commit()
    return project


@pytest.fixture
def second(first: Project, tmp_path: Path) -> Project:
    """A clone with a new student in params.yaml: no teacher, no model, no raw data."""
    first.run("git", "clone", "-q", str(first.root), str(tmp_path / "clone"))
    clone = Project(tmp_path / "clone")
    assert not any(
        (clone.root / name).exists() for name in ("teachers", "assets", "sources", "caches", ".stillroom")
    )
    clone.params(**with_assets(runs=NEW, students=STUDENTS))
    return clone


def test_a_pulled_cache_trains_and_evaluates_a_new_student_without_the_teacher(second: Project) -> None:
    second.run("dvc", "pull", "caches/toy")
    done = second.repro("--pull", "--allow-missing", "evaluate@new-kd-pool")
    assert done.stages == {"train@new-kd-pool", "evaluate@new-kd-pool"}
    assert (second.root / "results" / "eval" / "new-kd-pool.json").is_file()
    assert not (second.root / "teachers" / "tiny").exists()
    assert not (second.root / "assets" / "model").exists()


def test_without_the_pull_the_teacher_is_not_started_and_the_error_says_what_to_do(second: Project) -> None:
    shutil.copytree(toy_sources(second), second.root / "sources")  # even where the model could be had
    refused = second.repro("evaluate@new-kd-pool", check=False)
    assert refused.code != 0
    assert "teacher@tiny was finished on another machine" in refused.output
    assert "dvc pull caches/toy" in refused.output
    assert "STILLROOM_REBUILD=1" in refused.output
    assert "Traceback" not in refused.output
    assert not (second.root / "teachers" / "tiny" / "model.safetensors").exists()


def test_the_teacher_works_again_where_that_is_asked_for(second: Project) -> None:
    shutil.copytree(toy_sources(second), second.root / "sources")
    done = second.repro("cache@toy", STILLROOM_REBUILD="1")
    assert {"teacher@tiny", "cache@toy"} <= done.stages


def test_a_missing_cache_is_named_by_the_stage_with_the_command_that_fetches_it(second: Project) -> None:
    second.run("dvc", "pull", "data/toy")
    refused = second.stage("train", "new-kd-pool")
    assert refused.returncode == 1
    assert "NoManifest: there is no cache at caches/toy" in refused.stderr
    assert "dvc pull caches/toy" in refused.stderr


def test_a_bucket_is_a_remote_of_dvc_and_a_place_to_publish_a_cache(
    first: Project, second: Project, s3: Server, tmp_path: Path
) -> None:
    for project in (first, second):
        project.run("dvc", "remote", "add", "--force", "bucket", f"s3://{BUCKET}/dvc")
    first.run("dvc", "push", "--remote", "bucket", "caches/toy")
    second.run("dvc", "pull", "--remote", "bucket", "caches/toy")
    assert second.files("caches/toy") == first.files("caches/toy")

    second.run("dvc", "pull", "data/toy")
    said = first.stage("main", "publish", "toy", f"s3://{BUCKET}/caches/toy").stdout
    entry = YAML(typ="safe", pure=True).load(said)["received"]["toy"]
    run = NEW["new-kd-pool"] | {"cache": "far"}
    second.params(
        **with_assets(
            runs={"far": run}, students=STUDENTS, received={"far": entry}, workers={"local_gb": 0.001}
        )
    )
    done = second.repro("--single-item", "receive@far")
    done = second.repro("--single-item", "train@far")
    assert done.stages == {"train@far"}
    assert [path.name for path in (second.root / "caches" / "far").iterdir()] == ["remote.json"]
    assert (second.root / "models" / "far" / "seed-0").is_dir()


def toy_sources(clone: Project) -> Path:
    """The raw model and data of the first machine."""
    origin = clone.run("git", "remote", "get-url", "origin").stdout.strip()
    return Path(origin) / "sources"
