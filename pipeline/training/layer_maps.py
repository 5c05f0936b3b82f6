"""Which states of a cache a student's layers are matched with: a recipe's maps, resolved. Needs no torch.

What cannot be resolved is refused with all that is wrong, before the first step.
"""

from typing import NamedTuple

from pipeline.config.recipes import LayerMap, Match
from pipeline.config.students import Student, TinyBERTStudent
from storage.errors import Mismatch, SpecMismatch
from storage.spec import QKV_PARTS, HiddenSpec


class MatchedPair(NamedTuple):
    """States of the teacher and where the student has their like."""

    name: str  # of the cache's states: "layer.3", "qkv.6"
    layer: int  # of the student: 0 is the embeddings


class MatchPlan(NamedTuple):
    """All that one recipe matches of one student with one cache."""

    states: tuple[MatchedPair, ...]
    embeddings: tuple[MatchedPair, ...]
    attention: tuple[MatchedPair, ...]
    relations: tuple[MatchedPair, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What is read of the cache, each once."""
        return tuple(sorted({pair.name for pairs in self for pair in pairs}))


def resolve_layers(what: str, match: Match, student: Student, hidden: HiddenSpec | None) -> MatchPlan:
    """The pairs of layers that `match` means, of what a cache keeps.

    Raises SpecMismatch where the student or the cache cannot give one.
    """
    if not isinstance(student, TinyBERTStudent):
        raise SpecMismatch(
            f"the student of {what} has no layers to match",
            [Mismatch("student.kind", student.kind, "tinybert")],
            "Take a student of kind tinybert, or a recipe without match.",
        )
    widths = {name: hidden.kept_width(name) for name in hidden.names} if hidden else {}
    plan = MatchPlan((), (), (), ())
    if match.states:
        plan = plan._replace(states=_pairs("layer", match.states.map, widths, student.layers))
    if match.embeddings:
        plan = plan._replace(embeddings=(MatchedPair("layer.0", 0),))
    if match.attention:
        plan = plan._replace(attention=_pairs("qkv", match.attention.map, widths, student.layers))
    if match.relations:
        layer = match.relations.student_layer
        own = student.layers if layer == "last" else layer
        plan = plan._replace(relations=(MatchedPair(f"qkv.{match.relations.teacher_layer}", own),))
    wrong = [*_lacking(plan, widths, student.layers), *_misfits(plan, match, student, widths)]
    if match.states and match.states.loss == "cosine" and hidden and hidden.pca:
        wrong.append(Mismatch("match.states.loss", "cosine, but components lack the mean", "mse"))
    if wrong:
        raise SpecMismatch(
            f"the cache does not fit the recipe of {what}", wrong,
            f"The cache keeps {', '.join(widths) or 'no inner states'}: change the recipe's match, or what "
            "caches.NAME.hidden keeps (layers; qkv with pool: none).",
        )  # fmt: skip
    return plan


def _pairs(kind: str, chosen: LayerMap, widths: dict[str, int], num: int) -> tuple[MatchedPair, ...]:
    deepest = _deepest(kind, widths) or num  # a cache without any is refused for what it lacks
    if not isinstance(chosen, str):
        pairs = list(chosen)
    elif chosen == "uniform":
        pairs = [(-(-own * deepest // num), own) for own in range(1, num + 1)]
    else:
        first = deepest - num if chosen == "top" else 0
        pairs = [(first + own, own) for own in range(1, num + 1)]
    return tuple(MatchedPair(f"{kind}.{layer}", own) for layer, own in pairs)


def _deepest(kind: str, widths: dict[str, int]) -> int:
    """The deepest kept layer, 0 for none."""
    kept = (name.split(".") for name in widths)
    return max((int(layer) for prefix, layer in kept if prefix == kind), default=0)


def _lacking(plan: MatchPlan, widths: dict[str, int], num: int) -> list[Mismatch]:
    """Layers that the cache or the student does not have."""
    wrong = []
    for part, pairs in plan._asdict().items():
        wanted = [pair.name for pair in pairs]
        if lacking := [name for name in wanted if name not in widths]:
            wrong.append(Mismatch(f"match.{part}: layers of the cache", "not " + ", ".join(lacking), wanted))
        lowest = 1 if part in ("attention", "relations") else 0  # the embeddings attend to nothing
        if outside := [pair.layer for pair in pairs if not lowest <= pair.layer <= num]:
            wrong.append(Mismatch(f"match.{part}: layers of the student", f"{lowest} to {num}", outside))
    return wrong


def _misfits(
    plan: MatchPlan, match: Match, student: TinyBERTStudent, widths: dict[str, int]
) -> list[Mismatch]:
    """Depths, widths and heads that do not fit each other."""
    wrong = []
    for part, kind in (("states", "layer"), ("attention", "qkv")):
        settings, deepest = getattr(match, part), _deepest(kind, widths)
        if settings and settings.map == "top" and 0 < deepest < student.layers:
            where = f"match.{part}.map: top, layers of the student"
            wrong.append(Mismatch(where, student.layers, f"at most {deepest}"))
    for part in ("states", "embeddings"):
        found = sorted({widths[pair.name] for pair in getattr(plan, part) if pair.name in widths})
        if found and not getattr(match, part).project and found != [student.width]:
            wrong.append(Mismatch(f"match.{part}.project: false, width", student.width, found))
    for part in ("attention", "relations"):
        heads = getattr(match, part).heads if getattr(plan, part) else 1
        found = sorted(
            {widths[pair.name] // QKV_PARTS for pair in getattr(plan, part) if pair.name in widths}
        )
        for whose, each in (("cache", found), ("student", [student.width])):
            if uneven := [width for width in each if width % heads]:
                field = f"match.{part}.heads: width of the {whose}"
                wrong.append(Mismatch(field, uneven, f"a multiple of {heads}"))
    if match.attention and match.attention.heads != student.heads:
        wrong.append(Mismatch("match.attention.heads: student.heads", student.heads, match.attention.heads))
    return wrong
