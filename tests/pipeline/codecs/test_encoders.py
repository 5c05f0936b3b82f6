"""A codec is one place: its class, its encoder and its section of params.yaml have all that is special."""

import ast
import re
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from pipeline.codecs.encoders import ENCODERS
from pipeline.config.caches import MaskedShare, SampleTargets, ThresholdTargets, TopKTargets
from storage.codecs import Sample, SparseCodec, SparseSpec, Threshold, TopK
from storage.spec import Mask
from tests.imports import modules

CODECS: tuple[type[SparseSpec], ...] = get_args(SparseCodec)
SECTIONS = {section.spec_class: section for section in (TopKTargets, SampleTargets, ThresholdTargets)}
# The files that may distinguish codecs; all others use the attributes of a codec.
OWN_FILES = {"storage.codecs", "pipeline.codecs.encoders", "pipeline.config.caches"}
CLASSES = re.compile(r"\b(TopK|Sample|Threshold|SparseSpec|Dense)(Targets)?\b")
SETTINGS = re.compile(r"\b(codec|sparse)(\.name|\.layout)?$|\.codec$")
# What Spec.sparse and Spec.ranked are made of.
ANSWERS = {"self.codec == 'dense'", "self.sparse.layout == 'compact'"}


def test_every_codec_has_an_encoder_and_a_section() -> None:
    assert set(ENCODERS) == set(SECTIONS) == set(CODECS)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.__name__)
def test_a_codec_states_what_losses_may_do_and_what_counts_its_lists(codec: type[SparseSpec]) -> None:
    assert isinstance(codec.sampled, bool)
    assert isinstance(codec.tempered, bool)
    for columns in (codec.plain_columns, codec.compact_columns):
        assert {column.counted_by for column in columns.values()} - {None} <= {*columns}


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.__name__)
def test_a_section_has_the_settings_of_its_codec_within_the_same_bounds(codec: type[SparseSpec]) -> None:
    section = SECTIONS[codec]
    here, there = (_bounds(model.model_json_schema()["properties"]) for model in (section, codec))
    del here["codec"], here["layout"], there["name"], there["layout"], there["ranks"]
    assert here == there


def _bounds(properties: dict[str, Any]) -> dict[str, Any]:
    described = ("title", "default", "description")
    return {
        name: {key: value for key, value in about.items() if key not in described}
        for name, about in properties.items()
    }


def test_a_section_becomes_its_codec_and_only_compact_ones_have_a_table() -> None:
    table = "0" * 64
    assert TopKTargets(codec="topk", k=3).spec(table) == TopK(k=3, layout="compact", ranks=table)
    plain = SampleTargets(codec="sample", draws=9, seed=2, layout="plain")
    assert plain.spec(table) == Sample(draws=9, seed=2, layout="plain")
    threshold = ThresholdTargets(codec="threshold", tau=0.5, seed=7)
    assert threshold.spec(None) == Threshold(tau=0.5, seed=7, layout="compact")


@pytest.mark.parametrize(
    ("section", "spec", "settings"),
    [
        (SampleTargets, Sample, {"codec": "sample"}),
        (ThresholdTargets, Threshold, {"codec": "threshold"}),
        (MaskedShare, Mask, {}),
    ],
    ids=["sample", "threshold", "mask"],
)
def test_a_seed_that_no_cache_can_name_is_refused_in_params(section: Any, spec: Any, settings: Any) -> None:
    section(**settings, seed=2**63 - 1)
    with pytest.raises(ValidationError, match="less than 9223372036854775808"):
        section(**settings, seed=2**63)


def test_no_other_file_tells_codecs_apart() -> None:
    for name, path in modules().items():
        nodes = ast.walk(ast.parse(path.read_text())) if name not in OWN_FILES else ()
        found = {ast.unparse(node) for node in nodes if _tells_apart(node)}
        assert found <= (ANSWERS if name == "storage.spec" else set()), name


def _tells_apart(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
        return bool(CLASSES.search(ast.unparse(node.args[1])))
    if not isinstance(node, ast.Compare) or isinstance(node.ops[0], ast.Is | ast.IsNot):
        return False
    return any(SETTINGS.search(ast.unparse(side)) for side in (node.left, *node.comparators))


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(cache.codec, Sample | Threshold)", "isinstance(entry.targets, Dense)",
        "cache.codec == 'dense'", "'compact' != spec.codec.layout", "codec.name in ('topk', 'sample')",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code: str) -> None:
    assert any(_tells_apart(node) for node in ast.walk(ast.parse(code)))
