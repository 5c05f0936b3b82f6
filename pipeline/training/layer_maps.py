"""Which states of a cache a student's layers are matched with: a recipe's maps, resolved. Needs no torch.

What cannot be resolved is refused with all that is wrong, before the first step.
"""

from typing import NamedTuple

from pipeline.config.match import Match
from pipeline.config.students import STUDENTS, LayerSizes, StudentSection
from storage.errors import Mismatch, SpecMismatch
from storage.spec import QKV_PARTS, HiddenSpec

Widths = dict[str, int]  # of the states that a cache keeps, by name


class MatchedPair(NamedTuple):
    """States of the teacher and the student's layer that they are compared with."""

    name: str  # of the cache's states: "layer.3", "qkv.6"
    layer: int  # of the student: 0 is the embeddings


class MatchPlan(NamedTuple):
    """All that one recipe matches of one student with one cache."""

    pairs: dict[str, tuple[MatchedPair, ...]]  # by the part of the recipe's match
    width: int  # of the student's states

    @property
    def names(self) -> tuple[str, ...]:
        """What is read of the cache, each once."""
        return tuple(sorted({pair.name for pairs in self.pairs.values() for pair in pairs}))


def resolve_layers(what: str, match: Match, student: StudentSection, hidden: HiddenSpec | None) -> MatchPlan:
    """The pairs of layers that `match` means, of what a cache keeps.

    Raises SpecMismatch where the student or the cache cannot give one.
    """
    sizes = student.layer_sizes
    if sizes is None:
        kinds = " or ".join(kind for kind, section in STUDENTS.items() if section.matchable)
        raise SpecMismatch(
            f"the student of {what} has no layers to match",
            [Mismatch("student.layers", "none", f"those of {kinds}")],
            f"Take a student of kind {kinds}, or a recipe without match.",
        )
    widths = {name: hidden.kept_width(name) for name in hidden.names} if hidden else {}
    pairs = {
        name: tuple(
            MatchedPair(f"{part.reads}.{layer}", own)
            for layer, own in part.layer_pairs(_deepest(part.reads, widths), sizes.layers)
        )
        for name, part in match.parts.items()
    }
    plan = MatchPlan(pairs, sizes.width)
    wrong = [*_lacking(plan, match, widths, sizes.layers), *_too_deep(match, sizes, widths)]
    wrong += [*_uneven_widths(plan, match, widths), *_uneven_heads(plan, match, sizes, widths)]
    for name, part in match.parts.items():
        if part.needs_the_mean and hidden and hidden.pca:
            wrong.append(Mismatch(f"match.{name}.loss", "cosine, but components lack the mean", "mse"))
    if wrong:
        raise SpecMismatch(
            f"the cache does not fit the recipe of {what}", wrong,
            f"The cache keeps {', '.join(widths) or 'no hidden states'}: change the recipe's match, or what "
            "caches.NAME.hidden keeps (layers; qkv with pool: none).",
        )  # fmt: skip
    return plan


def _deepest(reads: str, widths: Widths) -> int:
    """The deepest kept layer, 0 for none."""
    kept = (name.split(".") for name in widths)
    return max((int(layer) for prefix, layer in kept if prefix == reads), default=0)


def _lacking(plan: MatchPlan, match: Match, widths: Widths, num: int) -> list[Mismatch]:
    """Layers that the cache or the student does not have."""
    wrong = []
    for part, pairs in plan.pairs.items():
        names = [pair.name for pair in pairs]
        if lacking := [name for name in names if name not in widths]:
            wrong.append(Mismatch(f"match.{part}: layers of the cache", "not " + ", ".join(lacking), names))
        lowest = 1 if match.parts[part].reads == "qkv" else 0  # the embeddings attend to nothing
        if outside := [pair.layer for pair in pairs if not lowest <= pair.layer <= num]:
            wrong.append(Mismatch(f"match.{part}: layers of the student", f"{lowest} to {num}", outside))
    return wrong


def _too_deep(match: Match, student: LayerSizes, widths: Widths) -> list[Mismatch]:
    """Students that have more layers than the cache keeps, matched from the top."""
    wrong = []
    for name, part in match.parts.items():
        deepest = _deepest(part.reads, widths)
        if getattr(part, "map", None) == "top" and 0 < deepest < student.layers:
            where = f"match.{name}.map: top, layers of the student"
            wrong.append(Mismatch(where, student.layers, f"at most {deepest}"))
    return wrong


def _uneven_widths(plan: MatchPlan, match: Match, widths: Widths) -> list[Mismatch]:
    """Widths that must be equal and are not."""
    wrong = []
    for name, part in match.parts.items():
        found = sorted({widths[pair.name] for pair in plan.pairs[name] if pair.name in widths})
        if found and part.needs_equal_widths and found != [plan.width]:
            wrong.append(Mismatch(f"match.{name}.project: false, width", plan.width, found))
    return wrong


def _uneven_heads(plan: MatchPlan, match: Match, student: LayerSizes, widths: Widths) -> list[Mismatch]:
    """Heads that do not divide a width, or are not the student's."""
    wrong = []
    for name, part in match.parts.items():
        if part.num_heads is None:
            continue
        found = sorted({widths[pair.name] // QKV_PARTS for pair in plan.pairs[name] if pair.name in widths})
        for owner, each in (("cache", found), ("student", [student.width])):
            if uneven := [width for width in each if width % part.num_heads]:
                field = f"match.{name}.heads: width of the {owner}"
                wrong.append(Mismatch(field, uneven, f"a multiple of {part.num_heads}"))
        if part.students_heads and part.num_heads != student.heads:
            wrong.append(Mismatch(f"match.{name}.heads: student.heads", student.heads, part.num_heads))
    return wrong
