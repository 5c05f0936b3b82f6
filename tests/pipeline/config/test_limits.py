"""Limits of params.yaml are those of caches, runs and URLs; a value past one is refused with its place."""

from pathlib import Path

import pytest

from pipeline.config.datasets import Dataset
from storage.fields import MAX_LABELS
from tests.pipeline.config.test_params import Change, refusal

SAMPLE, THRESHOLD, IMAGES = {"codec": "sample"}, {"codec": "threshold"}, "image-classification"


# Each of these passed, and ended in a traceback where the cache, the run or the URL was made.
@pytest.mark.parametrize(
    ("change", "place"),
    [
        (
            lambda p: p["caches"]["toy"].update(targets={"codec": "sample", "seed": 2**63}),
            "caches.toy.targets",
        ),
        (
            lambda p: p["caches"]["toy"].update(targets={"codec": "threshold", "seed": 2**63}),
            "caches.toy.targets",
        ),
        (lambda p: p["caches"]["toy"].update(mask={"seed": 2**63}), "caches.toy.mask.seed"),
        (lambda p: p["runs"]["fc-ce"].update(seeds=[2**63]), "runs.fc-ce.seeds"),
        (lambda p: p["teachers"]["tiny"].update(train={"seed": 2**63}), "teachers.tiny.train.seed"),
        (lambda p: p["teachers"]["tiny"].update(max_length=2**31 + 1), "teachers.tiny.max_length"),
        (lambda p: p["caches"]["toy"].update(hidden={"layers": [10_001]}), "caches.toy.hidden.layers"),
        (
            lambda p: p["caches"]["toy"].update(hidden={"qkv": [10_001], "pool": "none"}),
            "caches.toy.hidden.qkv",
        ),
        (lambda p: p["caches"]["toy"].update(hidden={"layers": [1], "pca": 2**21}), "caches.toy.hidden.pca"),
        (lambda p: p["caches"]["toy"].update(weights={"layers": [10_001]}), "caches.toy.weights.layers"),
        (
            lambda p: p["datasets"]["toy"].update(
                task="image-classification", images={"shape": [2**16, 1, 1]}
            ),
            "datasets.toy.images.shape",
        ),
        (
            lambda p: p.update(received={"far": {"url": f"s3://{'a' * 2000}", "manifest": "0" * 64}}),
            "received.far.url",
        ),
    ],
)
def test_a_value_that_no_cache_or_run_can_hold_is_refused_with_its_place(
    tmp_path: Path, change: Change, place: str
) -> None:
    assert place in refusal(tmp_path, change)


def test_as_many_labels_as_a_cache_can_hold_are_accepted_and_one_more_is_not() -> None:
    names = [str(number) for number in range(MAX_LABELS + 1)]
    assert len(Dataset.model_validate({"path": "x", "labels": names[:-1]}).labels) == MAX_LABELS
    with pytest.raises(ValueError, match="at most 100000 items"):
        Dataset.model_validate({"path": "x", "labels": names})
