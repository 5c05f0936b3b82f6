"""What cannot be a run: caches, rows and recipes that do not fit each other, before the first step."""

import json
from pathlib import Path
from typing import Any

from pipeline import by_config, config_recipes, encoders, kinds, layer_maps
from pipeline.data import POOL, SPLITS, VIEWS, Rows
from pipeline.decoders import refuse_misfit
from pipeline.mixing import refuse_unverified
from pipeline.schedules import ends
from pipeline.targets import refuse_recipe, refuse_task, refuse_truncated
from pipeline.tokens import TextReader
from storage import Cache
from storage.errors import AssetError, ConfigError, DataError, Mismatch, SpecMismatch

RECORD = "training.json"


def trained(directory: Path) -> dict[str, Any]:
    """What training wrote of the run in `directory`. Raises AssetError where it has not ended."""
    path = directory / RECORD
    if not path.is_file():
        raise AssetError(
            f"{directory} has no {RECORD}: the run is not trained, or not to its end.\n"
            f"`dvc repro train@{directory.name}` goes on with it (train-after@ where it stands in chained, "
            "train-tasks@ in multitask)."
        )
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def refuse_run(
    name: str, cache: Cache, rows: Rows, student: kinds.Student, recipe: config_recipes.Recipe, verified: Path
) -> None:
    """Raise ConfigError, DataError or SpecMismatch where this cache cannot teach the student so."""
    refuse_unverified(cache, verified)
    refuse_task(f"runs.{name}", cache.identity.spec.task, student.kind)
    refuse_recipe(f"runs.{name}", cache.identity.spec.task, recipe)
    if student.kind == "llama" and student.tokenizer != "teacher":
        raise ConfigError(
            f"the student of runs.{name} has a tokenizer of its own ({student.tokenizer} entries), but "
            "learns to expect the teacher's tokens.\nWrite tokenizer: teacher."
        )
    if recipe.pseudo_labels and cache.identity.spec.per_position:
        raise ConfigError(
            f"runs.{name}: its recipe gives the pool pseudo-labels, and text that is to be continued has "
            "labels of its own, the next tokens.\nWrite pseudo_labels: false."
        )
    if recipe.pool and not len(rows.select(POOL)):
        raise DataError(
            f"runs.{name}: its recipe trains on the pool, and the dataset has none.\n"
            "Add a pool under datasets, or choose a recipe with pool: false."
        )
    if recipe.match:
        layer_maps.resolve(f"runs.{name}", recipe.match, student, cache.identity.spec.hidden)
    for one in [recipe.chosen(values) for values in recipe.grid] or [recipe]:
        if not one.predicts or min(ends(one.alpha)) == 1:
            continue
        refuse_truncated(f"runs.{name}", cache.codec, one.divergence, one.temperature)
        if cache.identity.spec.per_position and any(end != 1 for end in ends(one.temperature)):
            raise SpecMismatch(
                f"the cache does not fit runs.{name}",
                [Mismatch("recipe.temperature", one.temperature, 1)],
                "The loss of a language model's head has no temperature. Write temperature: 1.",
            )
    if not len(rows.select("train")):
        raise DataError(
            f"runs.{name}: no row to train on is in all caches of {cache.path.parent}.\n"
            "Mix caches of the same dataset: row ids are made of a dataset's name and its texts."
        )
    there = 0 if rows.views is None else int(rows.views.max())
    if recipe.views > there:
        raise DataError(
            f"runs.{name}: its recipe trains on {recipe.views} views of each training row, and the dataset "
            f"has {there}.\nMake more of them (augmented.NAME.views), or lower the recipe's views."
        )
    rows = rows.with_views(recipe.views, recipe.view_labels)
    wanted = rows.row_ids.take(rows.select(*SPLITS, VIEWS, *((POOL,) if recipe.pool else ())))
    cache.check(f"runs.{name}", labels=rows.label_names, row_ids=wanted)


def start_of(init: Path, seed: int) -> Path:
    """The student of a trained run that this seed starts from: that of the same seed, or its only one."""
    own = init / f"seed-{seed}"
    return own if own.is_dir() else next(init.glob("seed-*"))


def refuse_start(name: str, cache: Cache, student: kinds.Student, init: Path | None) -> None:
    """Raise ConfigError or SpecMismatch where the student cannot start from what it is to start from."""
    if isinstance(student, kinds.Transformers):
        by_config.settings(student, 2, len(cache.labels))
    if init:
        _refuse_other_run(name, cache, student, init)
    elif (
        isinstance(student, kinds.FC | kinds.BiLSTM | kinds.TinyBERT)
        and student.init
        and student.init.from_teacher
    ):
        what, held = f"the student of runs.{name}", cache.weights_dir
        encoders.refuse_misfit(what, student, held, cache.weights_layers)
    elif isinstance(student, kinds.Llama) and student.init:
        refuse_misfit(f"the student of runs.{name}", student, cache.weights_dir, cache.weights_layers)


def _refuse_other_run(name: str, cache: Cache, student: kinds.Student, init: Path) -> None:
    """Raise SpecMismatch where the students of the run before are not those that this run trains on."""
    first = trained(init)["seeds"][0]["seed"]
    facts = json.loads((init / f"seed-{first}" / "student.json").read_text())
    sizes = {"student": student.model_dump(mode="json"), "num_labels": cache.identity.spec.num_outputs}
    wrong = [Mismatch(key, facts[key], wanted) for key, wanted in sizes.items() if facts[key] != wanted]
    known = cache.identity.tokenizer
    if known is not None and not isinstance(student, kinds.MLP) and student.tokenizer == "teacher":
        reads = TextReader(init / "tokenizer", student.max_length, "truncate").identity().content
        if reads != known.content:
            wrong.append(Mismatch("tokenizer.content", reads, known.content))
    if wrong:
        raise SpecMismatch(
            f"the students of {init} are no start for chained.{name}", wrong,
            "Chain runs of one student, over caches of one tokenizer and as many classes.",
        )  # fmt: skip
