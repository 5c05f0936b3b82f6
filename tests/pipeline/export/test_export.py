"""Export: ONNX gives the student's logits, int8 almost; an export predicts alone, without torch."""

import io
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import TypeAdapter

from pipeline.config.params import Export, Run
from pipeline.config.students import LlamaStudent, Student
from pipeline.data.rows import Rows
from pipeline.data.tokenizer import TextReader, Tokens
from pipeline.evaluation import latency
from pipeline.export import export_run as export_stage
from pipeline.export.compare import ComparedRows, ModelCall, compare_forms
from pipeline.export.export_run import export_run
from pipeline.export.predictor import FACTS, MODEL_FILES, OnnxModel, Predictor, find_export
from pipeline.export.to_onnx import write_onnx
from pipeline.streaming.model_inputs import InputTensors, call_model, input_tensors, num_rows
from pipeline.students.registry import build_student, load_student, save_student
from stages import main
from stages.commands import predict
from storage import Cache
from storage.errors import AssetError, ConfigError, DataError, ExportError
from tests.pipeline.conftest import World
from tests.toy import ROOT

ENTRIES: dict[str, dict[str, Any]] = {
    "fc": {"kind": "fc", "embedding": 32, "hidden": 16},
    "bilstm": {"kind": "bilstm", "embedding": 32, "hidden": 16},
    "tinybert": {"kind": "tinybert", "layers": 2, "width": 32, "heads": 2, "max_length": 32},
}
LENGTHS = (7, 1, 12, 4)


def entry(kind: str) -> Student:
    made: Student = TypeAdapter(Student).validate_python(ENTRIES[kind])
    return made


def run(kind: str) -> Run:
    return Run(dataset="toy", cache="toy", student=kind, recipe="kd", seeds=(0, 1))


def write_run(world: World, kind: str, out: Path) -> None:
    """What the train stage leaves of two seeds, with random weights; seed 1 is the better one."""
    student = entry(kind)
    reader = TextReader(Cache.open(world.cache).tokenizer_dir, student.max_length, "truncate")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_student(student, reader.num_ids, 2)
        save_student(out / f"seed-{seed}", model, student, reader.num_ids, 2)
    (out / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "tokenizer" / name).write_bytes((Cache.open(world.cache).tokenizer_dir / name).read_bytes())
    record = [{"seed": seed, "best_accuracy": 0.5 + 0.1 * seed, "best_loss": 0.7} for seed in (0, 1)]
    (out / "training.json").write_text(json.dumps({"seeds": record}))


class Made:
    """A student, its export, and the record of it."""

    def __init__(self, world: World, kind: str, root: Path) -> None:
        self.kind, self.models, self.directory = kind, root / "models", root / "exported" / kind
        write_run(world, kind, self.models)
        limits = Export(int8_max_loss=100.0)
        paths = world.run_paths(self.models)
        self.record = export_run(kind, run(kind), entry(kind), limits, paths, self.directory)

    @property
    def student(self) -> torch.nn.Module:
        return load_student(self.models / "seed-1")

    def ops(self, form: str) -> set[str]:
        return {node.op_type for node in onnx.load(self.directory / MODEL_FILES[form]).graph.node}


@pytest.fixture(scope="module")
def exports(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Exports of each kind, made once."""
    made: dict[str, Made] = {}
    root = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "LATENCY_REPEATS", 2)
        for kind in ENTRIES:
            made[kind] = Made(world, kind, root / kind)
    return made.__getitem__


def batch(rows: int) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(rows)])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(1, 20, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask}


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("rows", [1, 4, 32])
def test_onnx_gives_the_students_logits_for_any_number_of_rows_of_any_length(
    exports: Callable[[str], Made], kind: str, rows: int
) -> None:
    made = exports(kind)
    inputs = batch(rows)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    with torch.inference_mode():
        expected = made.student(**inputs).numpy()
    for form, near in (("float32", 1e-5), ("int8", 0.1)):
        logits = OnnxModel(made.directory / MODEL_FILES[form])(arrays)
        assert np.abs(logits - expected).max() < near


@pytest.mark.parametrize("kind", ENTRIES)
def test_the_record_has_accuracy_size_and_latency_of_each_form(
    exports: Callable[[str], Made], kind: str
) -> None:
    record = exports(kind).record
    assert record["about"]["seed"] == 1
    for form in ("torch", "float32", "int8"):
        assert record[form]["latency_ms_batch_1"] > 0
        assert record[form]["latency_ms_batch_32"] > 0
        assert record[form]["bytes"] > 0
    assert record["float32"]["largest_difference"] < 1e-5
    assert record["float32"]["points_lost"] == 0
    lost = 100 * (record["torch"]["accuracy"] - record["int8"]["accuracy"])
    assert record["int8"]["points_lost"] == pytest.approx(lost)
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("kind", ENTRIES)
def test_int8_holds_every_large_weight_in_eight_bits_and_lstms_compute_in_it(
    exports: Callable[[str], Made], kind: str
) -> None:
    made = exports(kind)
    weights = onnx.load(made.directory / MODEL_FILES["int8"]).graph.initializer
    large = [w for w in weights if np.prod(w.dims) >= 20 * 32]  # the embeddings, and more
    assert large
    types = {w.data_type for w in large}  # onnxruntime's LSTM takes signed weights alone
    assert types == {onnx.TensorProto.UINT8} | ({onnx.TensorProto.INT8} if kind == "bilstm" else set())
    assert "MatMulInteger" in made.ops("int8")
    assert ("DynamicQuantizeLSTM" in made.ops("int8")) == (kind == "bilstm")
    assert "LSTM" not in made.ops("int8")


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_model_holds_no_path_of_the_machine_that_made_it(exports: Callable[[str], Made], kind: str) -> None:
    for name in MODEL_FILES.values():
        content = (exports(kind).directory / name).read_bytes()
        assert b"site-packages" not in content
        assert b"students.py" not in content


def answers_of(model: torch.nn.Module) -> ModelCall:
    def answer(inputs: InputTensors) -> Any:
        with torch.inference_mode():
            return call_model(model, inputs).numpy()

    return answer


def scaled(answer: ModelCall, factor: float) -> ModelCall:
    return lambda inputs: answer(inputs) * factor


@pytest.fixture
def compared(world: World, exports: Callable[[str], Made]) -> tuple[Rows, Tokens, ModelCall]:
    rows = world.rows().only("test")
    reader = TextReader(exports("fc").directory, 32, "truncate")
    return rows, reader.read(rows.texts.to_pylist(), rows.row_ids), answers_of(exports("fc").student)


def test_a_model_with_other_logits_is_refused_with_the_row(
    compared: tuple[Rows, Tokens, ModelCall],
) -> None:
    rows, tokens, right = compared
    read = ComparedRows(rows, tokens, 0)
    row = 5

    def off(inputs: InputTensors) -> Any:
        logits = right(inputs)
        for place, own in enumerate(inputs["input_ids"]):
            if np.array_equal(own[inputs["attention_mask"][place]].numpy(), tokens.row(row)):
                logits[place] += 0.01
        return logits

    with pytest.raises(ExportError, match=r"runs\.x: its ONNX model, 1 rows at a time") as refused:
        compare_forms("x", read, {"torch": right, "float32": off, "int8": right}, 100)
    assert f"row {rows.row_ids[row]}" in str(refused.value)


def test_a_model_that_is_right_on_single_rows_alone_or_gives_nan_is_refused(
    compared: tuple[Rows, Tokens, ModelCall],
) -> None:
    rows, tokens, right = compared
    read = ComparedRows(rows, tokens, 0)

    def single(inputs: InputTensors) -> Any:
        return right(inputs) + (0.01 if num_rows(inputs) > 1 else 0)

    with pytest.raises(ExportError, match="32 rows at a time"):
        compare_forms("x", read, {"torch": right, "float32": single, "int8": right}, 100)

    nothing = scaled(right, float("nan"))
    with pytest.raises(ExportError, match="logits found"):
        compare_forms("x", read, {"torch": right, "float32": nothing, "int8": right}, 100)


def test_int8_that_loses_too_much_is_refused_and_an_allowed_loss_is_recorded(
    compared: tuple[Rows, Tokens, ModelCall],
) -> None:
    rows, tokens, right = compared
    read = ComparedRows(rows, tokens, 0)
    logits = right(input_tensors(tokens.padded(np.arange(len(rows.labels)), 0)))
    sign = 1 if (logits.argmax(1) == rows.labels).mean() > 0.5 else -1
    kept = max((logits.argmax(1) == rows.labels).mean(), (logits.argmin(1) == rows.labels).mean())
    forms = {"torch": scaled(right, sign), "float32": scaled(right, sign), "int8": scaled(right, -sign)}
    lost = 100 * (2 * kept - 1)
    assert lost > 0
    with pytest.raises(ExportError, match=rf"{lost:.2f} points lost, at most 0\.5 allowed"):
        compare_forms("x", read, forms, 0.5)
    found = compare_forms("x", read, forms, 100)
    assert found["int8"]["points_lost"] == pytest.approx(lost)
    assert found["int8"]["agreement"] == 0


def test_a_refused_export_cannot_be_used(
    world: World, exports: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models of another seed are written: the directory stays without its facts."""
    made, write = exports("fc"), write_onnx
    monkeypatch.setattr(
        export_stage, "write_onnx", lambda model, out: write(load_student(made.models / "seed-0"), out)
    )
    paths, out = world.run_paths(made.models), tmp_path / "exported" / "fc"
    with pytest.raises(ExportError, match="gives other logits than the student"):
        export_run("fc", run("fc"), entry("fc"), Export(), paths, out)
    with pytest.raises(AssetError, match=r"runs\.fc is not exported yet: make it with `dvc repro export@fc`"):
        find_export("fc", out.parent, lambda: ["fc"])


def test_a_language_model_is_not_exported_and_predict_says_why(world: World, tmp_path: Path) -> None:
    student = LlamaStudent(kind="llama")
    out = tmp_path / "exported" / "prose"
    record = export_run("prose", run("llama"), student, Export(), world.run_paths(tmp_path / "no"), out)
    assert "only classifiers of texts are exported" in record["about"]["not_exported"]
    assert [path.name for path in out.iterdir()] == [FACTS]
    with pytest.raises(ExportError, match=r"runs\.prose has no export: only classifiers of texts"):
        Predictor(out, "int8")


@pytest.mark.parametrize("kind", ENTRIES)
def test_an_answer_is_the_students_and_probabilities_sum_to_one(
    exports: Callable[[str], Made], kind: str
) -> None:
    made, text = exports(kind), "good bright film slow plot"
    reader = TextReader(made.models / "tokenizer", 32, "truncate")
    inputs = input_tensors(reader.read([text], [""]).padded(np.array([0]), reader.pad_id))
    with torch.inference_mode():
        expected = made.student(**inputs).softmax(1)[0].tolist()
    for form, near in (("float32", 1e-5), ("int8", 0.05)):
        answer = Predictor(made.directory, form).predict(text)  # type: ignore[arg-type]
        assert list(answer.probabilities) == ["negative", "positive"]
        assert list(answer.probabilities.values()) == pytest.approx(expected, abs=near)
        assert answer.label == max(answer.probabilities, key=lambda label: answer.probabilities[label])
        assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_predict_answers_texts_and_lines_as_words_and_as_json(
    exports: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = exports("bilstm")
    monkeypatch.chdir(made.directory.parent.parent)
    predict.main("bilstm", ["good film", "dull plot"])
    words = capsys.readouterr().out.splitlines()
    assert len(words) == 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("good film\ndull plot\n"))
    predict.main("bilstm", None, as_json=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in printed] == ["good film", "dull plot"]
    for line, answer in zip(words, printed, strict=True):
        label, shares = line.split("\t")
        assert label == answer["label"]
        assert f"{label} {answer['probabilities'][label]:.1%}" in shares
    predict.main(str(made.directory), ["good film"], as_json=True, float32=True)
    exact = json.loads(capsys.readouterr().out)["probabilities"]["positive"]
    assert exact != printed[0]["probabilities"]["positive"]
    assert exact == pytest.approx(printed[0]["probabilities"]["positive"], abs=0.05)


def test_what_cannot_be_answered_is_one_message(
    exports: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exports("fc")
    with pytest.raises(ConfigError, match=r"called 'fcc'; did you mean 'fc'\?"):
        find_export("fcc", made.directory.parent, list)
    with pytest.raises(ConfigError, match=r"called 'kd-pol'; did you mean 'kd-pool'\?"):
        find_export("kd-pol", made.directory.parent, lambda: ["kd-pool"])
    with pytest.raises(DataError, match="one of the texts is empty"):
        Predictor(made.directory, "int8").predict(" \n")
    for name in (FACTS, "tokenizer.json"):
        (tmp_path / name).write_bytes((made.directory / name).read_bytes())
    with pytest.raises(AssetError, match=r"model\.int8\.onnx is missing: fetch it with `dvc pull"):
        Predictor(tmp_path, "int8")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ConfigError, match="there is no text"):
        predict.main("fc", None)


def test_the_console_script_predicts_and_never_imports_torch(exports: Callable[[str], Made]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["stillroom"].split(":")
    code = (
        f"import sys; sys.argv = ['stillroom', 'predict', 'bilstm', 'good film']\n"
        f"from {module} import {function}\n"
        f"try: {function}()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'onnx', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=exports("bilstm").directory.parent.parent,
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\t")[0] in ("negative", "positive")


def test_a_command_needs_its_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stillroom", "bilstm", "good film"])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "stillroom has no command 'bilstm'" in capsys.readouterr().err
