"""The `targets` of a cache in params.yaml: a codec and its settings. docs/codecs.md says how to choose."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.schedules import ByConfidence, Schedule, ends
from pipeline.section import Section
from storage.errors import Mismatch, SpecMismatch
from storage.spec import Mask, Sample, Sha256, SparseCodec, Task, Threshold, TopK

if TYPE_CHECKING:
    from pipeline.config import Params
    from pipeline.config_recipes import Recipe

# Which caches each kind of student is trained on.
TEXT_ROWS: tuple[Task, ...] = (
    "sequence-classification", "multi-label-classification", "regression", "sentence-embedding"
)  # fmt: skip
STUDENT_TASKS: dict[str, tuple[Task, ...]] = {
    "fc": TEXT_ROWS, "bilstm": TEXT_ROWS, "tinybert": TEXT_ROWS, "llama": ("causal-lm",),
    "transformers": ("sequence-classification",), "mlp": ("image-classification",),
}  # fmt: skip
# The divergences of tasks that have not those of one class; the first is what a refusal advises.
DIVERGENCES: dict[Task, tuple[str, ...]] = {
    "multi-label-classification": ("forward",), "regression": ("mse",),
    "sentence-embedding": ("cosine", "mse"),
}  # fmt: skip
CLASS_DIVERGENCES = ("forward", "reverse", "jsd", "skewed")


class Dense(Section):
    """Every class's logit: for few classes."""

    codec: Literal["dense"]


class _Sparse(Section):
    layout: Literal["compact", "plain"] = "compact"
    """compact: half the bytes, or less. plain: ids and log-probabilities for any tool, to the bit."""


class TopKTargets(_Sparse):
    """The k largest probabilities and the exact mass of the rest. Biased: see docs/codecs.md."""

    codec: Literal["topk"]
    k: Annotated[int, Field(ge=1, le=65_535)] = 64


class SampleTargets(_Sparse):
    """Random sampling: `draws` draws from the teacher, as counts. Unbiased."""

    codec: Literal["sample"]
    draws: Annotated[int, Field(ge=1, le=65_535)] = 50
    seed: Annotated[int, Field(ge=0)] = 0


class ThresholdTargets(_Sparse):
    """Probabilities above about tau exactly, the rest sampled in steps of tau. Unbiased, and the smallest."""

    codec: Literal["threshold"]
    tau: Annotated[float, Field(ge=2**-15, le=1)] = 0.07
    """Smaller: more entries, less noise. 0.07 keeps about 10 entries of a language model's position."""
    seed: Annotated[int, Field(ge=0)] = 0


class MaskedShare(Section):
    """What a masked language model does not see of a row, and is asked about. Chosen once, for ever."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Of the row's tokens that are not special ones; at least one is masked."""
    seed: Annotated[int, Field(ge=0)] = 0


def _named(value: Any) -> Any:
    """`targets: threshold` is short for `targets: {codec: threshold}`."""
    return {"codec": value} if isinstance(value, str) else value


Targets = Annotated[
    Dense | TopKTargets | SampleTargets | ThresholdTargets,
    Field(discriminator="codec"),
    BeforeValidator(_named),
]


def spec(targets: Targets, ranks: Sha256 | None) -> Literal["dense"] | SparseCodec:
    """The codec as the cache knows it. `ranks` is the fingerprint of a compact layout's table."""
    if isinstance(targets, Dense):
        return "dense"
    table = ranks if targets.layout == "compact" else None
    if isinstance(targets, TopKTargets):
        return TopK(k=targets.k, layout=targets.layout, ranks=table)
    if isinstance(targets, SampleTargets):
        return Sample(draws=targets.draws, seed=targets.seed, layout=targets.layout, ranks=table)
    return Threshold(tau=targets.tau, seed=targets.seed, layout=targets.layout, ranks=table)


def mask(task: Task, entry: MaskedShare | None) -> Mask | None:
    """What is hidden from a teacher of this task, as the cache knows it."""
    return Mask(**(entry or MaskedShare()).model_dump()) if task == "masked-lm" else None


def misfits(params: "Params") -> Iterator[str]:
    """What caches ask for that their teachers' tasks do not have, field by field. Names are known to fit."""
    for name, entry in params.caches.items():
        task = params.datasets[params.teachers[entry.teacher].dataset].task
        dense = isinstance(entry.targets, Dense)
        if dense and task in ("causal-lm", "masked-lm"):
            yield f"caches.{name}.targets: dense is for few classes, not {task}; write targets: threshold"
        if not dense and task in ("token-classification", *DIVERGENCES):
            yield f"caches.{name}.targets: {task} keeps all its numbers; write targets: dense"
        vectors = params.teachers[entry.teacher].embedding
        if vectors is not None and task != "sentence-embedding":
            yield f"teachers.{entry.teacher}.embedding: {task} makes no vectors; remove it"
        if entry.hidden is not None and task == "image-classification":
            yield f"caches.{name}.hidden: no states of {task} are kept; remove it"
        if entry.mask is not None and task != "masked-lm":
            yield f"caches.{name}.mask: only masked-lm reads masks, its teacher's task is {task}; remove it"


def refuse_task(what: str, task: Task, kind: str) -> None:
    """Raise SpecMismatch where students of this kind cannot be trained on a cache of this task."""
    if task not in STUDENT_TASKS[kind]:
        others = [other for other, known in STUDENT_TASKS.items() if task in known]
        advice = f"Students that learn from a {task} cache: {', '.join(others)}." if others else (
            f"No student learns from a {task} cache yet: it can be captured, verified and read."
        )  # fmt: skip
        raise SpecMismatch(
            f"the cache does not fit the student of {what} ({kind})",
            [Mismatch("spec.task", task, " or ".join(STUDENT_TASKS[kind]))],
            advice,
        )


def refuse_recipe(what: str, task: Task, recipe: "Recipe") -> None:
    """Raise SpecMismatch where a recipe names a loss that this task has not, or labels where it has none."""
    known = DIVERGENCES.get(task, CLASS_DIVERGENCES)
    faults = []
    soft, one_class = min(ends(recipe.alpha)) < 1, task not in DIVERGENCES
    if soft and recipe.divergence not in known:
        faults.append(Mismatch("recipe.divergence", recipe.divergence, " or ".join(known)))
    tempered = any(end != 1 for end in ends(recipe.temperature))
    if soft and task in ("regression", "sentence-embedding") and tempered:
        faults.append(Mismatch("recipe.temperature", recipe.temperature, 1))
    elif soft and not one_class and isinstance(recipe.temperature, ByConfidence):
        faults.append(Mismatch("recipe.temperature", recipe.temperature, "a number, or a schedule"))
    if any(end != 0 for end in ends(recipe.alpha)) and task == "sentence-embedding":
        faults.append(Mismatch("recipe.alpha", recipe.alpha, 0))
    if recipe.pseudo_labels and not one_class:
        faults.append(Mismatch("recipe.pseudo_labels", True, "false: a row has no first choice"))
    if faults:
        advice = f"{task} has a loss of its own: write what is expected in a recipe for such runs."
        raise SpecMismatch(f"the recipe does not fit {what}", faults, advice)


def refuse_truncated(
    what: str,
    codec: Literal["dense"] | SparseCodec,
    divergence: str,
    temperature: float | Schedule | ByConfidence,
) -> None:
    """Raise SpecMismatch where a soft loss cannot be had from targets of this codec, with the reason."""
    if codec == "dense":
        return
    faults, reasons = [], []
    if divergence != "forward":
        faults.append(Mismatch("recipe.divergence", codec.name, f"dense (for {divergence})"))
        reasons.append(
            f"{divergence} weighs ids by the student's own probability; on truncated targets it is ruled by "
            "ids that the cache does not hold."
        )
    if isinstance(temperature, ByConfidence):
        faults.append(Mismatch("recipe.temperature", codec.name, f"dense (for {temperature})"))
        reasons.append("How sure the teacher is of a row is known where all its classes are kept.")
    elif isinstance(codec, Sample | Threshold) and any(end != 1 for end in ends(temperature)):
        faults.append(Mismatch("recipe.temperature", f"{codec.name} (temperature 1)", temperature))
        reasons.append(
            "A sampled weight is unbiased for the probability, not for a power of it: at another temperature "
            "the loss would be biased."
        )
    if faults:
        advice = " ".join(reasons) + " Use divergence: forward and temperature: 1, or a dense or topk cache."
        raise SpecMismatch(f"the cache does not fit {what}", faults, advice)
