"""Uses an installed Stillroom without torch, outside the checkout. Run by tests/compat.py in a directory that
holds golden/ and params.yaml.

Needs only what `stillroom[predict]` installs, so it uses assert and no pytest.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

GOLDEN = Path("golden")
HERE = Path.cwd().resolve()
NO_TORCH = ("torch", "transformers", "dask", "sklearn", "onnx")


def check_environment() -> None:
    """What runs is the installed wheel, and nothing heavy is next to it."""
    import pipeline
    import stillroom

    for module in (stillroom, pipeline):
        assert module.__file__ is not None
        assert Path(module.__file__).resolve().is_relative_to(HERE / "venv"), module.__file__
    for name in NO_TORCH:
        assert importlib.util.find_spec(name) is None, f"{name} is installed"
    home = Path(pipeline.__file__).parent
    for name in ("CAPTURE_VERSION", "report/report.html.j2"):
        assert (home / name).is_file(), f"the wheel lacks pipeline/{name}"
    assert {"Cache", "CachedDataset", "DistillationLoss", "load_params"} <= set(dir(stillroom))
    assert stillroom.load_params(Path("params.yaml")).runs


def read_caches() -> int:
    """Open every golden cache and read all of it; return their number."""
    import stillroom

    manifests = sorted(GOLDEN.rglob("manifest.json"))
    for manifest in manifests:
        cache = stillroom.Cache.open(manifest.parent)
        rows = 0
        for shard in cache.shards:
            rows += len(cache.read(shard).row_ids)
            for name in cache.hidden_names:
                assert len(cache.hidden(shard, name)), (manifest, name)
        assert rows == cache.num_rows > 0
    assert "torch" not in sys.modules
    return len(manifests)


def run_command() -> None:
    """The command `stillroom`, its help and its answers."""
    shown = subprocess.run(["stillroom", "--help"], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "predict" in shown, shown
    for form in ([], ["--float32"]):
        command = [
            "stillroom",
            "predict",
            "--json",
            *form,
            str(GOLDEN / "export"),
            "good film",
            "bad dull film",
        ]
        lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        answers = [json.loads(line) for line in lines]
        assert [answer["label"] for answer in answers] == ["positive", "negative"], answers
        assert all(max(answer["probabilities"].values()) > 0.9 for answer in answers), answers


if __name__ == "__main__":
    check_environment()
    caches = read_caches()
    assert caches >= 10, caches
    run_command()
