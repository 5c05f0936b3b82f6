"""Maps of layers: what they mean, over what a cache keeps, and all that is wrong in one refusal."""

from typing import Any

import pytest

from pipeline.config.match import Match
from pipeline.config.students import FCStudent, TinyBERTStudent
from pipeline.training.layer_maps import MatchPlan, resolve_layers
from storage.errors import SpecMismatch
from storage.spec import HiddenSpec

KEPT = HiddenSpec(layers=(0, 1, 2, 3, 4, 5, 6), qkv=(2, 4, 6), pool="none", width=12, dtype="float16")
BERT = TinyBERTStudent(kind="tinybert", layers=3, width=8, heads=2)


def resolve(match: dict[str, Any], hidden: HiddenSpec | None = KEPT, **student: Any) -> MatchPlan:
    entry = BERT.model_copy(update=student)
    return resolve_layers("runs.x", Match.model_validate(match), entry, hidden)


@pytest.mark.parametrize(
    ("chosen", "layers", "wanted"),
    [
        ("uniform", 3, [(2, 1), (4, 2), (6, 3)]),
        ("uniform", 4, [(2, 1), (3, 2), (5, 3), (6, 4)]),
        ("uniform", 6, [(i, i) for i in range(1, 7)]),
        ("top", 2, [(5, 1), (6, 2)]),
        ("bottom", 2, [(1, 1), (2, 2)]),
        ([[0, 0], [6, 2]], 2, [(0, 0), (6, 2)]),
    ],
)
def test_maps_pair_the_layers_of_teacher_and_student(
    chosen: Any, layers: int, wanted: list[tuple[int, int]]
) -> None:
    pairs = resolve({"states": {"map": chosen}}, layers=layers).pairs["states"]
    assert pairs == tuple((f"layer.{teacher}", own) for teacher, own in wanted)


def test_each_part_has_its_pairs_and_every_name_is_read_once() -> None:
    plan = resolve(
        {
            "states": {"map": [[6, 3], [6, 2]]},
            "embeddings": {},
            "attention": {"heads": 2},
            "relations": {"heads": 4, "teacher_layer": 6},
        }
    )
    assert plan.pairs["embeddings"] == (("layer.0", 0),)
    assert plan.pairs["attention"] == (("qkv.2", 1), ("qkv.4", 2), ("qkv.6", 3))
    assert plan.pairs["relations"] == (("qkv.6", 3),)
    assert plan.names == ("layer.0", "layer.6", "qkv.2", "qkv.4", "qkv.6")


@pytest.mark.parametrize(
    ("match", "student", "lines"),
    [
        ({"states": {"map": [[7, 1]]}}, {}, ["match.states: layers of the cache", "not layer.7"]),
        ({"states": {"map": [[6, 4]]}}, {}, ["match.states: layers of the student", "0 to 3", "[4]"]),
        ({"states": {"map": "bottom"}}, {"layers": 7}, ["not layer.7"]),
        ({"attention": {"heads": 2, "map": "bottom"}}, {}, ["not qkv.1, qkv.3"]),
        ({"attention": {"heads": 2, "map": [[2, 0]]}}, {}, ["layers of the student", "1 to 3", "[0]"]),
        ({"attention": {"heads": 4}}, {}, ["match.attention.heads: student.heads", "2", "4"]),
        ({"attention": {"heads": 8}}, {"heads": 8}, ["match.attention.heads: width of the cache", "[12]"]),
        (
            {"relations": {"heads": 3, "teacher_layer": 6}},
            {},
            ["match.relations.heads: width of the student"],
        ),
        (
            {"relations": {"heads": 8, "teacher_layer": 6}},
            {},
            ["match.relations.heads: width of the cache", "[12]"],
        ),
        ({"relations": {"heads": 2, "teacher_layer": 5}}, {}, ["not qkv.5"]),
        (
            {"relations": {"heads": 2, "teacher_layer": 6, "student_layer": 4}},
            {},
            ["match.relations: layers of the student", "1 to 3", "[4]"],
        ),
        ({"states": {"project": False}}, {}, ["match.states.project: false, width", "8", "[12]"]),
        ({"embeddings": {"project": False}}, {}, ["match.embeddings.project: false, width", "8", "[12]"]),
    ],
)
def test_what_cannot_be_resolved_is_refused_with_what_the_cache_keeps(
    match: dict[str, Any], student: dict[str, Any], lines: list[str]
) -> None:
    with pytest.raises(SpecMismatch, match=r"the cache does not fit the recipe of runs\.x") as refused:
        resolve(match, **student)
    assert len(refused.value.mismatches) == 1
    assert all(line in str(refused.value) for line in lines), str(refused.value)
    assert "The cache keeps layer.0, layer.1," in str(refused.value)


@pytest.mark.parametrize("part", [{"states": {"map": "top"}}, {"attention": {"heads": 2, "map": "top"}}])
def test_a_student_with_more_layers_than_its_teacher_has_none_at_the_top(part: dict[str, Any]) -> None:
    with pytest.raises(SpecMismatch, match=r"map: top, layers of the student +7 +at most 6"):
        resolve(part, layers=7)


def test_a_cache_without_states_and_a_student_without_layers_are_refused() -> None:
    with pytest.raises(SpecMismatch, match="The cache keeps no hidden states"):
        resolve({"states": {}}, None)
    match, student = Match.model_validate({"states": {}}), FCStudent(kind="fc")
    with pytest.raises(SpecMismatch, match=r"the student of runs\.x has no layers to match"):
        resolve_layers("runs.x", match, student, KEPT)


def test_the_angle_of_principal_components_is_not_that_of_the_states() -> None:
    components = KEPT.model_copy(update={"pca": 4, "basis": "0" * 64})
    with pytest.raises(SpecMismatch, match="components lack the mean"):
        resolve({"states": {"loss": "cosine"}}, components)
    assert resolve({"states": {}}, components).pairs["states"]
