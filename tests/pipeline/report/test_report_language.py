"""The report of language models: ranked by perplexity, compared in nats, with lines of their own."""

import html
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.report.test_report import World

ABOUT = {"task": "causal-lm", "dataset": "prose", "split": "test", "rows": 40, "machine": "m", "threads": 1}
LINES = [{"begins": "Once upon", "goes_on": " a time"}, {"begins": "It was <b>", "goes_on": " a dark night"}]


def metrics(losses: list[float], **others: float | None) -> dict[str, Any]:
    """One file of results/eval, but for what it is about."""

    def of(values: list[float | None]) -> dict[str, Any]:
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if len(known) == len(values) else None
        return {"mean": mean, "std": 0.1 if len(values) > 1 else None, "values": values}

    plain: dict[str, float | None] = {
        "kl_to_teacher": 1.5, "agreement": 0.4, "accuracy": 0.2, "ece": 0.02, "parameters": 11e6,
        "bytes": 44e6,
        "tokens_per_second": 9000.0, "train_tokens_per_second": 2000.0, "train_seconds": 60.0, **others,
    }  # fmt: skip
    found = {name: of([value] * len(losses)) for name, value in plain.items()}
    return {**found, "lm_loss": of([*losses]), "perplexity": of([math.exp(loss) for loss in losses])}


class Prose(World):
    """Directories of results of language models."""

    def add(self, kind: str, recipe: str, losses: list[float], taught: int, **others: float | None) -> None:
        name = f"teacher-{recipe}" if kind == "teacher" else f"llama-{recipe}"
        about = {"kind": kind, "name": name, "teacher": "big", "seeds": list(range(len(losses))), **ABOUT}
        student = None if kind == "teacher" else "llama"
        about |= {"cache": "prose", "student": student, "recipe": student and recipe, "lines": LINES}
        self.write(f"eval/{name}.json", {**metrics(losses, **others), "about": about})
        curve = [{"rows": 10 * i, "validation_accuracy": 0.1, "validation_loss": 9.0 - i} for i in (1, 2)]
        seeds = [{"seed": s, "teacher_rows_seen": taught, "curve": curve} for s in range(len(losses))]
        self.write(f"models/{name}/training.json", {"family": "KD" if taught else "CE", "seeds": seeds})


@pytest.fixture
def prose(tmp_path: Path) -> Prose:
    """A teacher at 3 nats, a student at 5 and 5.2 on labels alone, at 4.7 and 4.8 with the teacher."""
    made = Prose(tmp_path)
    made.add("teacher", "big", [3.0], 0, bytes=270e6, tokens_per_second=900.0, kl_to_teacher=None)
    made.add("run", "ce", [5.0, 5.2], 0)
    made.add("run", "kd", [4.7, 4.8], 500, kl_to_teacher=1.2)
    made.capture("prose", rows=500, seconds=100.0)
    return made


def test_the_headline_and_the_table_are_in_perplexity_and_nats_paired_by_seed(prose: Prose) -> None:
    line = prose.cells("llama-kd")
    assert line["perplexity"].startswith(f"{(math.exp(4.7) + math.exp(4.8)) / 2:,.1f}")
    assert line["nats below labels alone"].startswith("+0.350")
    assert line["KL to teacher (nats)"].startswith("1.200")
    assert prose.cells("teacher-big")["KL to teacher (nats)"] == "–"
    assert prose.finding() == (
        f"llama-kd has a perplexity of {(math.exp(4.7) + math.exp(4.8)) / 2:,.1f} on 40 test documents "
        "(its teacher: 20.1), in a file 6.1 times smaller, 10.0 times faster to read. "
        "That is 0.350 nats a token below the same student on labels alone."
    )


def test_the_lower_perplexity_is_the_marked_one(prose: Prose) -> None:
    page = prose.page()
    row = re.search(r'<th scope="row">llama-kd</th>(.*?)</tr>', page)
    assert row
    assert re.match(r'<td>2</td><td class="best">', row[1])


def test_where_labels_alone_are_better_it_says_so(prose: Prose) -> None:
    prose.add("run", "kd", [5.3, 5.4], 500)
    assert "It learned from labels alone: distillation did not help here." in prose.finding()


def test_lines_of_teacher_and_students_stand_beside_each_other_as_text(prose: Prose) -> None:
    page = prose.page()
    assert page.count(html.escape(LINES[1]["begins"])) == 1
    assert page.count("a dark night") == 3
    assert "who is right where" not in page.lower()
    assert f"{40 * 500 / (9 * 500):.1f} bytes a token" in page


def test_a_page_may_hold_classifiers_and_language_models(prose: Prose) -> None:
    prose.run("small", "ce", [0.7], taught=0)
    page = prose.page()
    assert 'scope="col">perplexity' in page
    assert 'scope="col">ROC AUC' in page
    assert page.count("<h2>Teacher and student</h2>") == 1
