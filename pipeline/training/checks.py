"""Checks before the first step: caches, rows, recipes and students that do not fit each other."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.recipes import ONLY_FORWARD, UNTEMPERED, Recipe
from pipeline.config.schedules import ByConfidence, Schedule, bounds
from pipeline.config.students import STUDENTS, Student
from pipeline.config.tasks import TASKS
from pipeline.data.rows import POOL, SPLITS, VIEWS, Rows
from pipeline.data.tokenizer import TextReader
from pipeline.streaming.verified import check_verified
from pipeline.students.bert_weights import check_bert_start
from pipeline.students.hf_config import student_config
from pipeline.students.llama_weights import check_llama_start
from pipeline.training.job import training_record
from pipeline.training.layer_maps import resolve_layers
from storage import Cache
from storage.codecs import SparseCodec
from storage.errors import ConfigError, DataError, Mismatch, SpecMismatch
from storage.tasks import Task

# By the teachers that a kind can start from, and by the library that has its config: see StudentSection.
START_CHECKS: dict[str, Callable[[str, Any, Path, Sequence[int]], None]] = {
    "bert": check_bert_start,
    "llama": check_llama_start,
}
CONFIG_CHECKS: dict[str, Callable[[Any, int, int], object]] = {"transformers": student_config}


def check_task(what: str, task: Task, kind: str) -> None:
    """Raise SpecMismatch where students of this kind cannot be trained on a cache of this task."""
    if not STUDENTS[kind].learns(TASKS[task]):
        others = [other for other, section in STUDENTS.items() if section.learns(TASKS[task])]
        known = [name for name, row in TASKS.items() if STUDENTS[kind].learns(row)]
        advice = f"Students that learn from a {task} cache: {', '.join(others)}." if others else (
            f"No student learns from a {task} cache yet: it can be captured, verified and read."
        )  # fmt: skip
        raise SpecMismatch(
            f"the cache does not fit the student of {what} ({kind})",
            [Mismatch("spec.task", task, " or ".join(known))],
            advice,
        )


def check_recipe(what: str, task: Task, recipe: "Recipe") -> None:
    """Raise SpecMismatch where a recipe names a loss that this task does not have, or labels without any."""
    row, faults = TASKS[task], []
    soft = min(bounds(recipe.alpha)) < 1
    if soft and recipe.divergence not in row.divergences:
        faults.append(Mismatch("recipe.divergence", recipe.divergence, " or ".join(row.divergences)))
    if soft and not row.tempered and any(end != 1 for end in bounds(recipe.temperature)):
        faults.append(Mismatch("recipe.temperature", recipe.temperature, 1))
    elif soft and not row.first_choice and isinstance(recipe.temperature, ByConfidence):
        faults.append(Mismatch("recipe.temperature", recipe.temperature, "a number, or a schedule"))
    if not row.has_label_loss and any(end != 0 for end in bounds(recipe.alpha)):
        faults.append(Mismatch("recipe.alpha", recipe.alpha, 0))
    if recipe.pseudo_labels and not row.first_choice:
        faults.append(Mismatch("recipe.pseudo_labels", True, "false: a row has no first choice"))
    if faults:
        own = "" if row.tempered else ", which has no temperature"
        advice = f"{task} has a loss of its own{own}: write what is expected in a recipe for such runs."
        raise SpecMismatch(f"the recipe does not fit {what}", faults, advice)


def check_truncated(
    what: str,
    codec: SparseCodec | None,
    divergence: str,
    temperature: float | Schedule | ByConfidence,
) -> None:
    """Raise SpecMismatch where targets of this codec do not allow a soft loss, with the reason."""
    if codec is None:
        return
    faults, reasons = [], []
    if divergence != "forward":
        faults.append(Mismatch("recipe.divergence", codec.name, f"dense (for {divergence})"))
        reasons.append(ONLY_FORWARD.format(divergence=divergence))
    if isinstance(temperature, ByConfidence):
        faults.append(Mismatch("recipe.temperature", codec.name, f"dense (for {temperature})"))
        reasons.append("The teacher's confidence in a row is known where all its classes are kept.")
    elif not codec.tempered and any(end != 1 for end in bounds(temperature)):
        faults.append(Mismatch("recipe.temperature", f"{codec.name} (temperature 1)", temperature))
        reasons.append(UNTEMPERED)
    if faults:
        advice = " ".join(reasons) + " Use divergence: forward and temperature: 1, or a dense or topk cache."
        raise SpecMismatch(f"the cache does not fit {what}", faults, advice)


def check_run(name: str, cache: Cache, rows: Rows, student: Student, recipe: Recipe, verified: Path) -> None:
    """Raise ConfigError, DataError or SpecMismatch where this cache cannot teach the student so."""
    run = f"runs.{name}"
    check_verified(cache, verified)
    check_task(run, cache.identity.spec.task, student.kind)
    _check_losses(run, cache, student, recipe)
    _check_labels(run, cache, student, recipe)
    _check_rows(run, cache, rows, recipe)


def _check_losses(run: str, cache: Cache, student: Student, recipe: Recipe) -> None:
    """Raise SpecMismatch where the cache does not have what a loss of the recipe needs."""
    spec = cache.identity.spec
    candidates = [recipe.chosen(values) for values in recipe.grid] or [recipe]
    for one in candidates:
        check_recipe(run, spec.task, one)
    if recipe.match:
        resolve_layers(run, recipe.match, student, spec.hidden)
    for one in candidates:
        if one.predicts and min(bounds(one.alpha)) < 1:
            check_truncated(run, spec.sparse, one.divergence, one.temperature)


def _check_labels(run: str, cache: Cache, student: Student, recipe: Recipe) -> None:
    """Raise ConfigError where the labels of a language model's positions cannot be learned so."""
    next_token = TASKS[cache.identity.spec.task].predicts_next
    if next_token and student.text is not None and student.text.tokenizer != "teacher":
        raise ConfigError(
            f"the student of {run} has a tokenizer of its own ({student.text.tokenizer} entries), but "
            "learns to predict the teacher's tokens.\nWrite tokenizer: teacher."
        )
    if recipe.pseudo_labels and cache.identity.spec.per_position:
        raise ConfigError(
            f"{run}: its recipe gives the pool pseudo-labels, and text that is to be continued has labels of "
            "its own, the next tokens.\nWrite pseudo_labels: false."
        )


def _check_rows(run: str, cache: Cache, rows: Rows, recipe: Recipe) -> None:
    """Raise DataError where the dataset lacks rows that the recipe trains on, SpecMismatch where the cache
    does.
    """
    if recipe.pool and not len(rows.select(POOL)):
        raise DataError(
            f"{run}: its recipe trains on the pool, and the dataset has none.\n"
            "Add a pool under datasets, or choose a recipe with pool: false."
        )
    if not len(rows.select("train")):
        raise DataError(
            f"{run}: no row to train on is in all caches of {cache.path.parent}.\n"
            "Mix caches of the same dataset: row ids are made of a dataset's name and its texts."
        )
    num_views = 0 if rows.views is None else int(rows.views.max())
    if recipe.views > num_views:
        raise DataError(
            f"{run}: its recipe trains on {recipe.views} views of each training row, and the dataset has "
            f"{num_views}.\nMake more of them (augmented.NAME.views), or lower the recipe's views."
        )
    rows = rows.with_views(recipe.views, recipe.view_labels)
    needed = rows.row_ids.take(rows.select(*SPLITS, VIEWS, *((POOL,) if recipe.pool else ())))
    cache.check(run, labels=rows.label_names, row_ids=needed)


def check_start(name: str, cache: Cache, student: Student, init: Path | None) -> None:
    """Raise ConfigError or SpecMismatch where the student's config or its first weights do not fit."""
    if student.configured_by:
        CONFIG_CHECKS[student.configured_by](student, 2, len(cache.labels))
    if init:
        _check_previous_run(name, cache, student, init)
    elif student.starts_from and student.starts_from_teacher:
        check = START_CHECKS[student.starts_from]
        check(f"the student of runs.{name}", student, cache.weights_dir, cache.weights_layers)


def _check_previous_run(name: str, cache: Cache, student: Student, init: Path) -> None:
    """Raise SpecMismatch where the students of the run in `init` are not a start for this student."""
    first = training_record(init)["seeds"][0]["seed"]
    facts = json.loads((init / f"seed-{first}" / "student.json").read_text())
    sizes = {"student": student.model_dump(mode="json"), "num_labels": cache.identity.spec.num_outputs}
    wrong = [Mismatch(key, facts[key], size) for key, size in sizes.items() if facts[key] != size]
    known, text = cache.identity.tokenizer, student.text
    if known is not None and text is not None and text.tokenizer == "teacher":
        found = TextReader(init / "tokenizer", text.max_length, "truncate").identity().content
        if found != known.content:
            wrong.append(Mismatch("tokenizer.content", found, known.content))
    if wrong:
        raise SpecMismatch(
            f"the students of {init} are not a start for chained.{name}", wrong,
            "Chain runs of one student, over caches of one tokenizer and as many classes.",
        )  # fmt: skip


def check_ranks(name: str, recipe: Recipe, num_ranks: int) -> None:
    """Raise ConfigError where a recipe's loss is not a sum over rows, so that ranks cannot share a batch."""
    if recipe.match:
        raise ConfigError(
            f"runs.{name}: its recipe matches hidden states, found {num_ranks} processes, expected one.\n"
            f"Train it in one: python -m stages.train {name}"
        )


def check_same_tokenizer(name: str, caches: Mapping[str, Cache], student: Student) -> None:
    """Raise SpecMismatch where the student has the teachers' tokenizer, and they have several."""
    known = {task: cache.identity.tokenizer for task, cache in caches.items()}
    contents = {task: tokenizer.content for task, tokenizer in known.items() if tokenizer is not None}
    first = next(iter(contents.values()))
    own = student.text is None or student.text.tokenizer != "teacher"
    if own or {*contents.values()} == {first}:
        return
    raise SpecMismatch(
        f"the caches of multitask.{name} come from different tokenizers",
        [
            Mismatch(f"tasks.{task}: tokenizer.content", content, first)
            for task, content in contents.items()
            if content != first
        ],
        "Give the student one of its own, learned from the text of all tasks: tokenizer: 8000.",
    )
