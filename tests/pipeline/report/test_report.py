"""The report: its numbers are the results', its sentences are always true, its page needs no network."""

import html
import itertools
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import plots
from pipeline.report.build import _compared, break_even, build_report
from pipeline.report.tables import choice_table
from pipeline.report.views import CLASSIFIERS, LABELS, VIEWS, View, view_of
from storage.errors import AssetError

ABOUT = {
    "task": "sequence-classification",
    "dataset": "reviews",
    "split": "test",
    "rows": 200,
    "machine": "a machine",
    "threads": 1,
}
FIELDS = [
    *(
        "roc_auc",
        "macro_f1",
        "agreement",
        "kl_to_teacher",
        "ece",
        "parameters",
        "bytes",
        "latency_ms_batch_1",
    ),
    *("latency_ms_batch_32", "train_seconds"),
    *("both_right", "only_teacher_right", "only_student_right", "both_wrong"),
]


def metrics(accuracy: list[float | None], **others: float) -> dict[str, Any]:
    """One file of results/eval, but for what it is about; metrics that are not named are 0.25."""
    known = [value for value in accuracy if value is not None]
    found: dict[str, Any] = {
        name: {"mean": (value := others.get(name, 0.25)), "std": None, "values": [value] * len(accuracy)}
        for name in FIELDS
    }
    mean = sum(known) / len(known) if known else None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {**found, "accuracy": {"mean": mean, "std": std, "values": accuracy}}


def plain(page: str) -> str:
    """Text without its markup, single spaces between words."""
    bare = re.sub(r"<[^>]*>", " ", re.sub("</?b>", "", page))
    return " ".join(html.unescape(bare).split())


class World:
    """Directories of results, as the stages leave them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("eval", "capture", "models", "export"):
            (root / name).mkdir()

    def run(
        self, student: str, recipe: str, accuracy: list[float | None], taught: int = 1000, **others: Any
    ) -> None:
        """A run that saw `taught` rows of the teacher with each seed."""
        name = f"{student}-{recipe}"
        family = others.pop("family", "KD" if taught else "CE")
        seeds = others.pop("seeds", list(range(len(accuracy))))
        about = {"kind": "run", "name": name, "student": student, "recipe": recipe, "seeds": seeds, **ABOUT}
        about |= {"cache": "reviews", "teacher": "big", **others.pop("about", {})}
        self.write(f"eval/{name}.json", {**metrics(accuracy, **others), "about": about})
        curve = [{"rows": 100 * look, "validation_accuracy": 0.5 + 0.1 * look} for look in (1, 2)]
        record = [{"seed": seed, "teacher_rows_seen": taught, "curve": curve} for seed in seeds]
        self.write(f"models/{name}/training.json", {"family": family, "seeds": record})

    def teacher(self, name: str, accuracy: float, **others: float) -> None:
        """A teacher's row."""
        about = {"kind": "teacher", "name": f"teacher-{name}", "teacher": name, "seeds": [0], **ABOUT}
        about |= {"cache": None, "student": None, "recipe": None}
        self.write(f"eval/teacher-{name}.json", {**metrics([accuracy], **others), "about": about})

    def capture(self, name: str, rows: int, seconds: float, teacher: str = "big") -> None:
        """A cache that cost `seconds`, of a teacher that was fine-tuned for 300."""
        found = {"cache": name, "teacher": teacher, "rows": rows, "positions": 9 * rows, "shards": 2}
        found |= {"seconds": seconds, "teacher_train_seconds": 300.0, "truncated_rows": 0}
        found |= {"logit_bytes": 40 * rows, "hidden_bytes": 0, "precision": "float32"}
        self.write(f"capture/{name}.json", found)

    def write(self, path: str, content: dict[str, Any]) -> None:
        """One JSON file."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(json.dumps(content))

    def page(self) -> str:
        """The report over all that was written."""
        out = self.root / "report" / "index.html"
        build_report(*(self.root / name for name in ("eval", "capture", "models", "export")), out)
        return out.read_text()

    def finding(self) -> str:
        """The headline of the page."""
        found = re.search(r'<p class="finding">(.*?)</p>', self.page())
        assert found
        return html.unescape(found[1])

    def cells(self, name: str) -> dict[str, str]:
        """One line of the page's table: heading -> text."""
        page = self.page()
        headings = [html.unescape(text) for text in re.findall(r'<th scope="col">(.*?)</th>', page)[1:]]
        line = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', page)
        assert line
        return dict(zip(headings, re.findall(r"<td.*?>(.*?)</td>", line[1]), strict=True))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A teacher at 80 %, a student at 70 % on labels alone and at 76 % with the teacher."""
    made = World(tmp_path)
    made.teacher("big", 0.8, bytes=90e6, latency_ms_batch_1=6.0, parameters=22e6)
    made.run("small", "ce", [0.68, 0.70, 0.72], taught=0, bytes=9e6, latency_ms_batch_1=2.0)
    made.run("small", "kd", [0.75, 0.76, 0.77], bytes=9e6, latency_ms_batch_1=2.0, parameters=2e6)
    made.capture("reviews", rows=4000, seconds=2000.0)
    return made


def test_the_dataset_with_the_most_runs_comes_first(world: World) -> None:
    world.run("few", "ce", [0.9], taught=0, about={"dataset": "digits", "teacher": None, "cache": None})
    assert re.findall(r"<h2.*?>(.*?)</h2>", world.page())[:1] == ["reviews"]


def test_the_numbers_of_the_table_are_those_of_the_results(world: World) -> None:
    line = world.cells("small-kd")
    assert line["accuracy"].startswith("76.0 %")
    assert line["of the teacher's"].startswith("95.0 %")
    assert line["points over labels alone"].startswith("+6.0")
    assert line["MB on disk"] == "9.0"
    assert line["parameters"] == "2.00 M"
    assert world.cells("teacher-big")["points over labels alone"] == "–"


def test_points_over_labels_alone_are_paired_by_seed(world: World) -> None:
    """Seeds 1 and 2 are in both: 0.78 - 0.70 and 0.74 - 0.72; seed 7 has no partner and does not count."""
    world.run("small", "kd", [0.78, 0.74, 0.10], seeds=[1, 2, 7])
    line = world.cells("small-kd")["points over labels alone"]
    assert line.startswith("+5.0"), line
    assert "± 4.2" in line  # the sample standard deviation of 8 and 2


def test_the_headline_says_what_distillation_gave(world: World) -> None:
    assert world.finding() == (
        "small-kd is right on 76.0% of 200 test rows, 95.0% of the teacher's accuracy, in a file 10.0 times "
        "smaller, 3.0 times faster. That is +6.0 points over the same student on labels alone."
    )


def test_the_headline_says_when_distillation_did_not_help(world: World) -> None:
    world.run("small", "kd", [0.60, 0.61, 0.62])
    assert world.finding().startswith("small-ce is right on 70.0% of 200 test rows")
    assert world.finding().endswith(
        "It learned from labels alone: distillation did not help here. The best distilled run, small-kd, is "
        "9.0 points behind."
    )


def test_labels_alone_is_what_a_run_did_not_what_its_recipe_is_called(world: World) -> None:
    world.run("other", "plain", [0.5, 0.5, 0.5], taught=0)
    world.run("other", "ce", [0.6, 0.6, 0.6], taught=10)
    assert world.cells("other-ce")["points over labels alone"].startswith("+10.0")
    assert world.cells("other-plain")["points over labels alone"] == "–"


def test_without_a_teacher_or_a_partner_the_headline_is_shorter(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run("small", "kd", [0.75])
    assert world.finding() == "small-kd is right on 75.0% of 200 test rows."
    world.run("small", "ce", [0.9], taught=0)
    assert "did not help" in world.finding()


def test_a_run_is_compared_with_its_own_teacher(world: World) -> None:
    world.teacher("giant", 0.95)
    world.run("small", "kd", [0.76, 0.76, 0.76], about={"teacher": "giant"})
    assert world.cells("small-kd")["of the teacher's"].startswith("80.0 %")
    assert world.cells("small-ce")["of the teacher's"].startswith("87.5 %")


def test_a_metric_that_could_not_be_had_is_a_dash_and_not_a_crash(world: World) -> None:
    world.run("small", "kd", [None, None, None])
    assert world.cells("small-kd")["accuracy"] == "–"
    assert world.finding().endswith("It learned from labels alone.")


def test_the_best_student_of_a_column_is_marked_and_a_teacher_never_is(world: World) -> None:
    page = world.page()
    marked = {
        name: len(re.findall(r'class="best"', line))
        for name, line in re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page)
    }
    assert marked["teacher-big"] == 0
    assert marked["small-kd"] > marked["small-ce"] > 0


def test_a_task_that_was_learned_beside_others_is_no_baseline_of_labels_alone() -> None:
    def row(name: str, accuracy: float, **more: Any) -> dict[str, Any]:
        about = {"name": name, "student": "small", "teacher": "big", "seeds": [0], "distilled": False}
        return {**about, "metrics": metrics([accuracy]), **more}

    runs = [row("beside", 0.9, run="both"), row("plain", 0.7), row("kd", 0.8, distilled=True)]
    found = _compared(runs[2], runs, [], CLASSIFIERS)
    assert found["metrics"]["over_labels"]["mean"] == pytest.approx(10)


def test_break_even_by_hand() -> None:
    """The capture cost 2,000 s for 4,000 rows: half a second a row. Trainings see 3,000 and 1,000 rows."""
    runs = [{"name": name, "cache": "c"} for name in ("plain", "long", "short")]
    training = {
        "plain": {"seeds": [{"teacher_rows_seen": 0}]},
        "long": {"seeds": [{"teacher_rows_seen": 3000}]},
        "short": {"seeds": [{"teacher_rows_seen": 1000}] * 2},
    }
    found = break_even(runs, [{"cache": "c", "seconds": 2000.0, "rows": 4000}], training)
    assert found == ([0.0, 1500.0, 2000.0, 2500.0], [2000.0] * 4, 2)
    assert break_even(runs[:1], [{"cache": "c", "seconds": 2000.0, "rows": 4000}], training) is None


def test_break_even_is_told_and_so_is_its_absence(world: World) -> None:
    assert "have not paid for it yet: 1,500 of 2,000 core-seconds" in world.page()
    world.run("small", "kd", [0.76, 0.76, 0.76], taught=2500)
    assert "pays for itself after <strong>2</strong> student trainings" in world.page()


def test_a_teacher_that_two_caches_share_was_fine_tuned_once(world: World) -> None:
    world.capture("more", rows=100, seconds=10.0)
    world.run("small", "kd-more", [0.7, 0.7, 0.7], about={"cache": "more"})
    assert world.page().count("fine-tuning big") == 1


@pytest.mark.parametrize("shown", VIEWS, ids=lambda shown: shown.metric)
def test_results_are_shown_by_the_metrics_that_they_have(shown: View) -> None:
    found = {name: {"mean": 0.5} for name, *_ in shown.columns}
    assert view_of([{"metrics": found}]) is shown


def test_a_choice_by_the_score_names_what_the_score_of_the_task_is() -> None:
    candidates = [{"values": {"alpha": 0.0}, "accuracy": [0.6], "loss": [0.5]}]
    choice = {"folds": 2, "seed": 0, "judged_by": "accuracy", "chosen": {"alpha": 0.0}}
    table = choice_table("run", {"choice": {**choice, "candidates": candidates}}, LABELS)
    assert (table["score"], table["judged_by"]) == ("macro F1", "macro F1")
    assert table["lines"][0]["cells"][0]["text"] == "60.0 %"


def test_what_a_number_was_chosen_from_is_shown_with_its_spread(world: World) -> None:
    assert "Choice of recipes by cross-validation" not in world.page()
    candidates = [
        {"values": {"alpha": 0.0}, "accuracy": [0.6, 0.8], "loss": [0.5, 0.5]},
        {"values": {"alpha": 0.5}, "accuracy": [0.8, 0.9], "loss": [0.4, 0.6]},
    ]
    choice = {"folds": 2, "seed": 0, "judged_by": "accuracy", "seconds": 12.0, "chosen": {"alpha": 0.5}}
    record = json.loads((world.root / "models/small-kd/training.json").read_text())
    record["choice"] = {**choice, "candidates": candidates}
    world.write("models/small-kd/training.json", record)
    page = world.page()
    assert "small-kd: 2 folds of the training rows, seed 0, by accuracy" in page
    lines = dict(re.findall(r'<th scope="row">(alpha .*?)</th>(.*?)</tr>', page))
    assert list(lines) == ["alpha 0.0", "alpha 0.5 (chosen)"]
    assert re.findall(r">([^<>]+)<small>± ([^<]+)</small>", lines["alpha 0.0"])[0] == ("70.0 %", "14.1 %")
    assert 'class="best"' in lines["alpha 0.5 (chosen)"]
    assert 'class="best"' not in lines["alpha 0.0"]


def test_the_page_needs_no_network(world: World) -> None:
    page = re.sub(r'xmlns(:\w+)?="http[^"]*"|<!DOCTYPE[^>]*>', "", world.page())
    assert "http" not in page
    assert "<script" not in page
    assert not re.search(r'(src|href)="[^#]', page)
    assert page.count("<svg") == 6


def test_the_page_has_the_same_bytes_every_time(world: World) -> None:
    assert world.page() == world.page()


def test_hostile_names_are_only_names(world: World) -> None:
    name = "a$b$<script>-<b>kd"
    world.run("a$b$<script>", "<b>kd", [0.7, 0.7, 0.7])
    assert (world.root / "eval" / f"{name}.json").is_file()
    page = world.page()
    assert "<script" not in page
    assert "<b>kd" not in page
    assert page.count(html.escape(name)) >= 3  # in the table and the plots


def test_one_run_with_one_seed_is_enough(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.run("small", "kd", [0.75], taught=0)
    assert world.cells("small-kd")["accuracy"] == "75.0 %"
    assert "When the cache has paid" not in world.page()


def test_what_is_missing_is_said_with_what_to_do(world: World) -> None:
    (world.root / "models/small-kd/training.json").unlink()
    with pytest.raises(AssetError, match=r"small-kd.training\.json is missing: run `dvc repro`, or fetch it"):
        world.page()


def test_no_results_at_all_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"there are no results in .*: run `dvc repro` first"):
        World(tmp_path).page()


def test_names_of_points_that_would_overlap_are_moved_apart() -> None:
    points = [plots.Point(f"run-{i}", "s", "r", 10.0, 0.8, None) for i in range(4)]
    drawn = plots.scatter(points, "MB", plots.Palette(["s"], ["r"]), "accuracy", percent=True)
    heights = sorted(float(y) for y in re.findall(r' y="([\d.]+)"[^>]*>run-\d', drawn))
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(heights)) > 8
