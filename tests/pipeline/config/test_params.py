"""params.yaml is refused with every fault in one message, each with its place and the nearest known name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_params, pick_entry
from pipeline.config.params import Params
from storage.errors import ConfigError
from tests import toy

Change = Callable[[dict[str, Any]], object]


def load(root: Path, change: Change = lambda shelves: None) -> Params:
    shelves = copy.deepcopy(toy.params())
    change(shelves)
    toy.write_params(root, shelves)
    return load_params(root / "params.yaml")


def refusal(root: Path, change: Change) -> str:
    with pytest.raises(ConfigError) as refused:
        load(root, change)
    return str(refused.value)


def test_the_toy_and_the_demo_are_accepted(tmp_path: Path) -> None:
    assert load(tmp_path).runs["fc-ce"].seeds == (0, 1)
    assert load_params(toy.ROOT / "params.yaml").runs


@pytest.mark.parametrize(
    ("change", "place", "nearest"),
    [
        (lambda p: p.update(dataset={}), "dataset", "datasets"),
        (lambda p: p["datasets"]["toy"].update(paht="x"), "datasets.toy.paht", "path"),
        (lambda p: p["datasets"]["toy"].update(columns={"txt": "x"}), "columns.txt", "text"),
        (lambda p: p["datasets"]["toy"]["pool"].update(word=[1, 2]), "pool.word", "words"),
        (lambda p: p["datasets"]["toy"]["split"].update(tain=0.0), "toy.split.tain", "train"),
        (lambda p: p["teachers"]["tiny"].update(train={"epoch": 1}), "teachers.tiny.train.epoch", "epochs"),
        (lambda p: p["caches"]["toy"]["hidden"].update(layer=[1]), "caches.toy.hidden.layer", "layers"),
        (lambda p: p["caches"]["toy"].update(mask={"shar": 0.1}), "caches.toy.mask.shar", "share"),
        (lambda p: p["students"]["fc"].update(hiden=3), "students.fc.hiden", "hidden"),
        (
            lambda p: p["students"].update(b={"kind": "bilstm", "embeding": 3}),
            "students.b.embeding",
            "embedding",
        ),
        (lambda p: p["recipes"]["ce"].update(temprature=2.0), "recipes.ce.temprature", "temperature"),
        (lambda p: p["runs"]["fc-ce"].update(seed=[1]), "runs.fc-ce.seed", "seeds"),
        (lambda p: p["workers"].update(seeds_at_a_time=1), "workers.seeds_at_a_time", "seeds_at_once"),
        (lambda p: p["assets"].update(a={"source": "x", "sha": "y"}), "assets.a.sha", "sha256"),
    ],
)
def test_an_unknown_key_is_refused_at_any_depth_with_the_nearest_one(
    tmp_path: Path, change: Change, place: str, nearest: str
) -> None:
    message = refusal(tmp_path, change)
    assert f"{place}: unknown key; did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda p: p["teachers"]["tiny"].update(dataset="toys"),
            "teachers.tiny.dataset: no 'toys' in datasets",
        ),
        (lambda p: p["caches"]["toy"].update(dataset="toys"), "caches.toy.dataset: no 'toys' in datasets"),
        (
            lambda p: p["augmented"].update(more={"dataset": "tooy", "model": "model"}),
            "augmented.more.dataset: no 'tooy' in datasets",
        ),
        (
            lambda p: (
                p["augmented"].update(more={"dataset": "toy", "model": "model"}),
                p["runs"]["fc-ce"].update(dataset="moore"),
            ),
            "runs.fc-ce.dataset: no 'moore' in datasets or augmented",
        ),
        (lambda p: p["caches"]["toy"].update(teacher="tine"), "caches.toy.teacher: no 'tine' in teachers"),
        (
            lambda p: p["runs"]["fc-ce"].update(cache="tooy"),
            "runs.fc-ce.cache: no 'tooy' in caches",
        ),
        (lambda p: p["runs"]["fc-ce"].update(student="fcc"), "runs.fc-ce.student: no 'fcc' in students"),
        (lambda p: p["runs"]["fc-ce"].update(recipe="kd-pol"), "runs.fc-ce.recipe: no 'kd-pol' in recipes"),
    ],
)
def test_a_name_that_no_shelf_holds_is_refused_with_the_nearest_one(
    tmp_path: Path, change: Change, line: str
) -> None:
    message = refusal(tmp_path, change)
    assert line + "; did you mean " in message


def test_every_missing_name_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, lambda p: p["runs"]["fc-ce"].update(cache="no", student="none"))
    assert "runs.fc-ce.cache" in message
    assert "runs.fc-ce.student" in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda p: p["students"]["fc"].update(kind="bilsm"),
            ("students.fc", "'bilsm'", "did you mean 'bilstm'"),
        ),
        (
            lambda p: p["caches"]["toy"].update(precision="bf16"),
            ("caches.toy.precision", "'bf16'", "bfloat16"),
        ),
        (
            lambda p: p["caches"]["toy"].update(targets="tresh"),
            ("caches.toy.targets", "'tresh'", "'threshold'"),
        ),
        (lambda p: p["datasets"]["toy"].update(empty="dorp"), ("datasets.toy.empty", "did you mean 'drop'")),
    ],
)
def test_a_word_outside_its_choices_is_refused_with_the_choices(
    tmp_path: Path, change: Change, parts: tuple[str, ...]
) -> None:
    message = refusal(tmp_path, change)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda p: p["recipes"]["ce"].update(epochs="3"), "recipes.ce.epochs"),
        (lambda p: p["recipes"]["ce"].update(epochs=2.5), "recipes.ce.epochs"),
        (lambda p: p["recipes"]["ce"].update(epochs=0), "recipes.ce.epochs"),
        (lambda p: p["recipes"]["ce"].update(alpha=1.5), "recipes.ce.alpha"),
        (lambda p: p["recipes"]["ce"].update(temperature=0.0), "recipes.ce.temperature"),
        (lambda p: p["recipes"]["ce"].update(temperature=float("inf")), "recipes.ce.temperature"),
        (lambda p: p["recipes"]["ce"].update(pool="yes"), "recipes.ce.pool"),
        (lambda p: p["datasets"]["toy"].update(labels=["one"]), "datasets.toy.labels"),
        (lambda p: p["datasets"]["toy"].update(labels=["a", "a"]), "datasets.toy.labels"),
        (lambda p: p["datasets"]["toy"].pop("labels"), "datasets.toy.labels"),
        (lambda p: p["datasets"]["toy"]["split"].update(train=0.9), "datasets.toy.split"),
        (lambda p: p["datasets"]["toy"]["pool"].update(words=[9, 3]), "datasets.toy.pool"),
        (
            lambda p: p["datasets"]["toy"].update(blocks={}),
            "datasets.toy.blocks: rows of a sequence-classification dataset stay whole",
        ),
        (lambda p: p["caches"]["toy"]["hidden"].update(layers=[1, 1]), "caches.toy.hidden.layers"),
        (lambda p: p["caches"]["toy"]["hidden"].update(layers=[]), "caches.toy.hidden: name the layers"),
        (
            lambda p: p["caches"]["toy"]["hidden"].update(qkv=[1]),
            "caches.toy.hidden: qkv is kept of each token",
        ),
        (lambda p: p["caches"]["toy"]["hidden"].update(qkv=[0], pool="none"), "caches.toy.hidden.qkv"),
        (
            lambda p: p["caches"]["toy"].update(hidden={"qkv": [1], "pool": "none", "pca": 2}),
            "caches.toy.hidden: pca is of layers",
        ),
        (lambda p: p["caches"]["toy"]["hidden"].update(dtype="int4"), "caches.toy.hidden.dtype"),
        (lambda p: p["caches"]["toy"].update(weights={"layers": []}), "caches.toy.weights.layers"),
        (lambda p: p["caches"]["toy"].update(mask={"share": 0.0}), "caches.toy.mask.share"),
        (lambda p: p["datasets"]["toy"].update(task="masked-lm"), "datasets.toy.labels"),
        (lambda p: p["runs"]["fc-ce"].update(seeds=[]), "runs.fc-ce.seeds"),
        (lambda p: p["runs"]["fc-ce"].update(seeds=[3, 3]), "runs.fc-ce.seeds"),
        (lambda p: p["students"].update({"Bad Name": p["students"]["fc"]}), "students.Bad Name"),
        (lambda p: p["students"].update(b={"kind": "tinybert", "width": 10, "heads": 3}), "students.b"),
        (lambda p: p["assets"].update(a={"source": "pypi:x==1", "sha256": "abc"}), "assets.a.sha256"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_with_its_place(
    tmp_path: Path, change: Change, place: str
) -> None:
    assert place in refusal(tmp_path, change)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"width": 24, "heads": 5}, "width 24 is not an even multiple of heads 5"),
        ({"width": 24, "heads": 4, "kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"layers": 3, "init": {"layers": [0, 1]}}, "init names 2 layers of the teacher for 3"),
        ({"layers": 2, "init": {"layers": [1, 1]}}, "students.small.init.layers: 1 is listed twice"),
        (
            {"layers": 1, "init": {"layer": [1]}},
            "students.small.init.layer: unknown key; did you mean 'layers'?",
        ),
        ({"layers": 1, "init": {"layers": [1]}, "tokenizer": 900}, "so needs its tokenizer: teacher"),
    ],
)
def test_a_decoder_whose_parts_do_not_fit_each_other_is_refused(
    tmp_path: Path, sizes: dict[str, Any], reason: str
) -> None:
    message = refusal(tmp_path, lambda p: p["students"].update(small={"kind": "llama", **sizes}))
    assert reason in message


TASKS: dict[str, dict[str, Any]] = {
    "sequence-classification": {},
    "token-classification": {"task": "token-classification"},
    "causal-lm": {"task": "causal-lm", "labels": []},
    "masked-lm": {"task": "masked-lm", "labels": []},
}


@pytest.mark.parametrize(
    ("task", "cache", "line"),
    [
        ("sequence-classification", {"mask": {}}, "caches.toy.mask: only masked-lm reads masks"),
        ("token-classification", {"mask": {}}, "caches.toy.mask: only masked-lm reads masks"),
        ("causal-lm", {"targets": "topk", "mask": {}}, "caches.toy.mask: only masked-lm reads masks"),
        ("causal-lm", {}, "caches.toy.targets: dense is for few classes"),
        ("masked-lm", {}, "caches.toy.targets: dense is for few classes"),
        ("token-classification", {"targets": "topk"}, "caches.toy.targets: token-classification keeps all"),
        ("sequence-classification", {"targets": "topk"}, None),
        ("token-classification", {}, None),
        ("causal-lm", {"targets": "threshold"}, None),
        ("masked-lm", {"targets": "threshold"}, None),
        ("masked-lm", {"targets": "threshold", "mask": {"share": 0.3, "seed": 1}}, None),
    ],
)
def test_a_cache_asks_for_what_the_task_of_its_teacher_has(
    tmp_path: Path, task: str, cache: dict[str, Any], line: str | None
) -> None:
    def change(shelves: dict[str, Any]) -> None:
        shelves["datasets"]["toy"] |= TASKS[task]
        shelves["caches"]["toy"].pop("hidden")
        shelves["caches"]["toy"] |= cache

    if line is None:
        load(tmp_path, change)
    else:
        assert line in refusal(tmp_path, change)


def test_the_pool_with_labels_only_is_refused_with_what_to_do(tmp_path: Path) -> None:
    message = refusal(tmp_path, lambda p: p["recipes"]["kd-pool"].update(alpha=1.0))
    assert "set alpha below 1, or pool: false" in message


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ({"match": {}}, "recipes.ce.match: nothing to match"),
        ({"match": {"prediction": 0.0}}, "recipes.ce.match: nothing to match"),
        ({"match": {"state": {}}}, "recipes.ce.match.state: unknown key; did you mean 'states'?"),
        ({"match": {"states": {"map": "topp"}}}, "recipes.ce.match.states.map: found 'topp'"),
        ({"match": {"states": {"map": []}}}, "recipes.ce.match.states.map"),
        ({"match": {"states": {"map": [[1, 2, 3]]}}}, "recipes.ce.match.states.map"),
        ({"match": {"states": {"weight": 0.0}}}, "recipes.ce.match.states.weight"),
        ({"match": {"attention": {}}}, "recipes.ce.match.attention.heads"),
        ({"match": {"relations": {"heads": 2}}}, "recipes.ce.match.relations.teacher_layer"),
        ({"pool": "only"}, "set alpha below 1, or pool: false"),
        ({"pool": "only", "alpha": 0.5, "views": 1}, "pool: only trains on the pool alone, views are of"),
        ({"pool": "onyl"}, "recipes.ce.pool: found 'onyl', expected 'only'"),
        ({"pool": "only", "match": {"states": {"map": [[0, 0], [2, 1]]}}}, None),
    ],
)
def test_what_is_matched_is_said_in_full(tmp_path: Path, recipe: dict[str, Any], line: str | None) -> None:
    if line is None:
        assert load(tmp_path, lambda p: p["recipes"]["ce"].update(recipe)).recipes["ce"].pool == "only"
    else:
        assert line in refusal(tmp_path, lambda p: p["recipes"]["ce"].update(recipe))


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    def two(shelves: dict[str, Any]) -> None:
        shelves["recipes"]["ce"]["epochs"] = 0
        shelves["students"]["fc"]["hiden"] = 3

    message = refusal(tmp_path, two)
    assert "recipes.ce.epochs" in message
    assert "hiden" in message


def test_1e_4_without_a_point_is_a_number(tmp_path: Path) -> None:
    load(tmp_path)
    path = tmp_path / "params.yaml"
    path.write_text(path.read_text().replace("    kind: fc\n", "    kind: fc\n    learning_rate: 1e-4\n"))
    assert load_params(path).students["fc"].learning_rate == 1e-4


@pytest.mark.parametrize(
    "content", [b"a: [1", b"a: 1\na: 2\n", b"\xff\xfe\x00a", b"- a list\n", b"just words\n", b""]
)
def test_what_is_not_yaml_or_no_mapping_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*params\.yaml"):
        load_params(tmp_path / "params.yaml")


def test_a_name_on_the_command_line_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'fc-ce'"):
        pick_entry(load(tmp_path).runs, "runs", "fc-cee")


def test_sections_that_are_left_out_are_empty(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("{}\n")
    empty = load_params(tmp_path / "params.yaml")
    assert all(
        getattr(empty, name) == {} for name in Params.model_fields if name not in ("export", "workers")
    )
    assert empty.export.int8_max_loss == 1.0
    assert empty.workers.capture == "inline"
    kept = {name: section for name, section in toy.params().items() if section}
    assert load(tmp_path).runs.keys() == load_runs(tmp_path, kept).keys()


def load_runs(root: Path, sections: dict[str, Any]) -> dict[str, Any]:
    toy.write_params(root, sections)
    return dict(load_params(root / "params.yaml").runs)


def test_params_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).recipes["ce"].alpha = 0.1  # type: ignore[misc]


def test_augmented_datasets_are_datasets_to_caches_and_runs_under_a_name_of_their_own(tmp_path: Path) -> None:
    def more(p: dict[str, Any], name: str = "more") -> None:
        p["augmented"][name] = {"dataset": "toy", "model": "model"}
        p["caches"]["toy"]["dataset"] = p["runs"]["fc-ce"]["dataset"] = name

    assert load(tmp_path, more).augmented["more"].views == 1
    assert "'toy' is in datasets and in augmented" in refusal(tmp_path, lambda p: more(p, "toy"))


def test_a_run_with_the_name_of_a_teachers_results_is_refused(tmp_path: Path) -> None:
    def more(p: dict[str, Any]) -> None:
        p["runs"]["teacher-tiny"] = p["runs"]["fc-ce"]

    assert "'teacher-tiny' is a run, and the results of teachers.tiny" in refusal(tmp_path, more)


def test_entries_that_do_not_fit_each_other_come_in_one_message(tmp_path: Path) -> None:
    def two(p: dict[str, Any]) -> None:
        p["augmented"]["toy"] = {"dataset": "toy", "model": "model"}
        p["caches"]["toy"]["mask"] = {}

    message = refusal(tmp_path, two)
    assert "'toy' is in datasets and in augmented" in message
    assert "caches.toy.mask" in message
