"""Metrics against cases that can be done by hand."""

import math

import numpy as np
import pytest

from pipeline.evaluation.results import over_seeds
from pipeline.objectives.classification import (
    Labels,
    Logits,
    calibration_error,
    class_agreement,
    class_quality,
)


def log_of(*rows: list[float]) -> Logits:
    return np.log(np.array(rows, np.float32))


def labels(*values: int) -> Labels:
    return np.array(values, np.int32)


def test_the_calibration_error_is_the_weighted_gap_of_confidence_and_accuracy() -> None:
    # two rows of confidence .9, one of them right: gap |.5 - .9|; two of .6, both right: gap |1 - .6|
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    found = calibration_error(probability, labels(0, 1, 1, 1))
    assert found == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_a_confidence_of_one_falls_into_the_last_bin_and_is_calibrated_where_it_is_right() -> None:
    assert calibration_error(np.array([[1.0, 0.0]]), labels(0)) == 0
    assert calibration_error(np.array([[1.0, 0.0]]), labels(1)) == 1


def test_agreement_and_kl_to_the_teacher_are_those_of_the_hand() -> None:
    student, teacher = log_of([0.8, 0.2], [0.8, 0.2]), log_of([0.9, 0.1], [0.1, 0.9])
    found = class_agreement(student, teacher, labels(0, 0))
    first = 0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2)
    second = 0.1 * math.log(0.1 / 0.8) + 0.9 * math.log(0.9 / 0.2)
    assert found["kl_to_teacher"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert found["agreement"] == 0.5
    assert (found["both_right"], found["only_student_right"]) == (0.5, 0.5)
    assert found["only_teacher_right"] == found["both_wrong"] == 0


def test_huge_logits_overflow_nothing() -> None:
    huge = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
    assert class_agreement(huge, huge, labels(0, 1))["kl_to_teacher"] == 0
    assert class_quality(huge, labels(0, 1))["ece"] == 0


def test_quality_knows_accuracy_f1_and_a_perfect_ranking() -> None:
    found = class_quality(log_of([0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]), labels(0, 0, 1, 1))
    assert found["accuracy"] == 0.5
    assert found["roc_auc"] == 1  # every positive is ranked above every negative
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("classes", [2, 3])
def test_an_auc_without_all_classes_present_is_none_and_not_a_number(classes: int) -> None:
    found = class_quality(np.zeros((2, classes), np.float32), labels(0, 0))
    assert found["roc_auc"] is None


def test_the_spread_over_seeds_is_that_of_a_sample() -> None:
    found = over_seeds([{"accuracy": 0.5}, {"accuracy": 0.7}])["accuracy"]
    assert found["mean"] == pytest.approx(0.6)
    assert found["std"] == pytest.approx(0.1 * math.sqrt(2))
    assert found["values"] == [0.5, 0.7]


def test_one_seed_has_no_spread_and_a_metric_that_one_seed_lacks_has_no_mean() -> None:
    assert over_seeds([{"accuracy": 0.5}])["accuracy"]["std"] is None
    assert over_seeds([{"roc_auc": 0.5}, {"roc_auc": None}])["roc_auc"] == {
        "mean": None,
        "std": None,
        "values": [0.5, None],
    }
