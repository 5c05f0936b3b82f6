"""The fair comparison by hand: families, pairs of seeds, intervals; and what the page says of exports."""

import html
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.comparison import mean_difference
from pipeline.report.views import VIEWS
from tests.pipeline.report.test_report import World, plain

FORM = {"accuracy": 0.8, "points_lost": 0.0, "agreement": 1.0, "largest_difference": 0.0}


def exported(name: str, milliseconds: tuple[float, float, float], **about: Any) -> dict[str, Any]:
    """One file of results/export; torch, ONNX and int8 need these milliseconds a row."""
    record: dict[str, Any] = {
        form: {**FORM, "bytes": 4e6, "latency_ms_batch_1": ms, "latency_ms_batch_32": 20 * ms}
        for form, ms in zip(("torch", "float32", "int8"), milliseconds, strict=True)
    }
    return {**record, "about": {"name": name, "dataset": "reviews", "seed": 2, "machine": "m", **about}}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """The four families of one student, three seeds each."""
    made = World(tmp_path)
    made.teacher("big", 0.9)
    made.run("small", "ce", [0.70, 0.72, 0.71], taught=0, family="CE")
    made.run("small", "ce-pool", [0.75, 0.76, 0.77], family="CE + extra text")
    made.run("small", "kd", [0.73, 0.71, 0.72], family="KD")
    made.run("small", "kd-pool", [0.78, 0.79, 0.80], family="KD + extra text")
    return made


def lines(world: World, heading: str) -> dict[str, list[str]]:
    """The lines of the table below a heading, as plain text: name -> cells."""
    part = world.page().partition(f"<h2>{heading}</h2>")[2].partition("</table>")[0]
    found = re.findall(r"<tr>(<th class.*?)</tr>", part)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line) for line in found]
    return {name: [html.unescape(plain(cell)) for cell in rest] for name, *rest in cells}


def test_the_interval_is_students_t_over_paired_seeds() -> None:
    """Differences 5, 4, 6: mean 5, standard error 1 / sqrt 3, t of two degrees of freedom 4.303."""
    found = mean_difference([5.0, 4.0, 6.0])
    assert found is not None
    half = 4.302653 / 3**0.5
    assert found[:3] == pytest.approx((5.0, 5.0 - half, 5.0 + half), abs=1e-5)
    assert found.certain
    unsure = mean_difference([5.0, -4.0, 6.0])
    assert unsure is not None
    assert not unsure.certain
    assert mean_difference([5.0]) == (5.0, None, None, 1)
    assert mean_difference([]) is None


def test_each_family_is_beside_labels_alone_and_kd_beside_labels_on_the_same_text(world: World) -> None:
    found = lines(world, "Fair comparison")
    assert [cells[0] for cells in found.values()] == ["CE", "CE + extra text", "KD", "KD + extra text"]
    assert [cells[2] for cells in found.values()] == ["71.0 %", "76.0 %", "72.0 %", "79.0 %"]
    assert found["small-ce"][3:] == ["± 1.0", "–", "–"]
    assert found["small-ce-pool"][4] == "+5.0 +2.5 to +7.5"
    assert found["small-ce-pool"][5] == "–"
    assert found["small-kd"][4:] == ["+1.0 -4.0 to +6.0"] * 2
    assert found["small-kd-pool"][4] == "+8.0 +5.5 to +10.5"
    assert found["small-kd-pool"][5] == "+3.0 +3.0 to +3.0"


def test_what_leaves_zero_out_is_bold_and_the_gain_is_taken_apart(world: World) -> None:
    page = world.page()
    assert "<b>+8.0</b>" in page
    assert "<b>+1.0</b>" not in page
    assert (
        "small-kd-pool: +8.0 over labels alone. +5.0 come with extra text that carries the teacher's first "
        "choices as labels, +3.0 with its probabilities." in plain(page)
    )


def test_the_best_of_several_baselines_is_compared_with(world: World) -> None:
    world.run("small", "weak", [0.60, 0.60, 0.60], taught=0, family="CE")
    assert lines(world, "Fair comparison")["small-kd"][4].startswith("+1.0")
    assert lines(world, "Fair comparison")["small-weak"][4].startswith("-11.0")


def test_a_student_without_labels_alone_is_not_compared(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run("small", "kd", [0.73])
    world.run("small", "kd-pool", [0.78], family="KD + extra text")
    assert "Fair comparison" not in world.page()
    world.run("small", "ce", [0.70], taught=0)
    found = lines(world, "Fair comparison")
    assert found["small-kd-pool"][4:] == ["+8.0 one seed", "–"]


def test_exports_are_told_with_their_times_the_fastest_first_and_those_that_are_none(world: World) -> None:
    assert "As shipped" not in world.page()
    world.write("export/small-kd.json", exported("small-kd", (6.0, 3.0, 2.0)))
    world.write("export/small-ce.json", exported("small-ce", (1.0, 1.0, 1.25)))
    world.write(
        "export/other.json",
        {"about": {"name": "other", "dataset": "reviews", "not_exported": "it is a decoder."}},
    )
    world.write("export/far.json", exported("far", (1.0, 1.0, 1.0), dataset="elsewhere"))
    found = lines(world, "As shipped")
    assert list(found) == ["small-ce", "small-kd"]
    assert found["small-kd"][:4] == ["2", "80.0 %", "80.0 %", "100.0 %"]
    assert found["small-kd"][4:] == [
        "4.0", "4.0", "4.0", "6.00", "3.00", "2.00", "120.00", "60.00", "40.00", "3.0 times",
    ]  # fmt: skip
    assert found["small-ce"][-1] == "0.8 times"
    assert "other is not exported: it is a decoder." in world.page()


def test_gains_are_named_by_what_runs_are_compared_by(world: World) -> None:
    assert "Gains in accuracy (points), paired by seed" in plain(world.page())
    headings = {shown.metric: shown.compared_heading for shown in VIEWS}
    assert headings == {
        "perplexity": "loss (nats a token)",
        "rmse": "RMSE",
        "cosine": "cosine to teacher",
        "accuracy": "accuracy",
        "macro_f1": "macro F1",
    }
