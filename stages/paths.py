"""Where stages write their outputs. dvc.yaml has the same paths; a test compares the two."""

from pathlib import Path

from pipeline.config.params import ChainedRun, Run, RunInputs, TaskRun, Workers

STORE = Path(".stillroom")
ASSETS = Path("assets")
DATA = Path("data")
TEACHERS = Path("teachers")
CACHES = Path("caches")
VERIFIED = Path("verified")
TASKS = Path("tasks")
MODELS = Path("models")
TRAINING = Path(".stillroom/training")  # DVC removes models/RUN before it is trained
EXPORTED = Path("exported")
EVAL = Path("results/eval")
EXPORT = Path("results/export")
CAPTURE = Path("results/capture")
CURVES = Path("results/curves")
LIMITS = Path("results/limits.json")
REPORT = Path("report/index.html")


def of_run(name: str, run: Run, workers: Workers | None = None) -> RunInputs:
    """What a run reads and where it writes; `workers` limits the local disk that it takes."""
    local_gb = workers.local_gb if workers else None
    return RunInputs(
        cache=CACHES / run.cache,
        dataset=DATA / run.dataset,
        verified=VERIFIED / f"{run.cache}.json",
        out=MODELS / (run.run if isinstance(run, TaskRun) else name),
        init=MODELS / run.init if isinstance(run, ChainedRun) else None,
        task=name if isinstance(run, TaskRun) else None,
        checkpoints=TRAINING / (run.run if isinstance(run, TaskRun) else name),
        local_bytes=None if local_gb is None else round(local_gb * 1e9),
        decoded_bytes=round(workers.decoded_gb * 1e9) if workers else 0,
    )
