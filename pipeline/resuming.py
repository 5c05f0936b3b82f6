"""Which checkpoint belongs to which training: all that decides its numbers, the code included.

The machine is left out: whoever moves a training to another one wants it to go on there.
"""

import hashlib
from pathlib import Path

import torch

from pipeline import hardware
from pipeline.checkpoints import Keeper
from pipeline.run_checks import start_of
from pipeline.runs import Job
from storage.mixture import open_cache
from storage.spec import sha256_json

VERSION = 1  # of what a checkpoint holds
CODE = ("pipeline", "storage")  # packages: other code may train otherwise


def of_job(job: Job) -> Keeper | None:
    """The keeper of a job's checkpoint; None where none are wanted."""
    directory = job.paths.checkpoints
    if directory is None or job.checkpoint_minutes is None:
        return None
    name = f"seed-{job.seed}"
    if job.trial is not None:
        name = f"fold-{job.trial.fold}-{sha256_json(job.recipe.model_dump(mode='json'))[:16]}"
    label = f"{job.paths.out.name}, {job.label}"
    return Keeper(directory / f"{name}.safetensors", label, decided_by(job), 60 * job.checkpoint_minutes)


def decided_by(job: Job) -> dict[str, str]:
    """Everything that decides a training, by the name that people know it by."""
    if job.parts:
        found = {"weights": str({task: part.weight for task, part in job.parts.items()})}
        for task, own in job.one_by_one.items():
            found |= {f"{fact} of {task}": value for fact, value in decided_by(own).items()}
        return found
    init = start_of(job.paths.init, job.seed) if job.paths.init else None
    code = [Path(__file__).parent.parent / package for package in CODE]
    return {
        "format": str(VERSION),
        "seed": str(job.seed),
        "fold": "none" if job.trial is None else f"{job.trial.fold} of {job.trial.folds}",
        "student": sha256_json(job.student.model_dump(mode="json")),
        "recipe": sha256_json(job.recipe.model_dump(mode="json")),
        "cache": open_cache(job.paths.cache, job.paths.local_bytes).manifest_sha256,
        "dataset": _content(job.paths.dataset),
        "tokenizer": _content(job.paths.out / "tokenizer"),
        "start": _content(init) if init else "none",
        "code": _content(*code, pattern="*.py"),
        "torch": torch.__version__,
        "device": hardware.device().type,
        "number of processes": str(hardware.ranks()[1]),
    }


def _content(*directories: Path, pattern: str = "*") -> str:
    """sha256 hex over the names and bytes of all files below these directories."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(path for path in directory.rglob(pattern) if path.is_file()):
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(directory.parent)} {own}\n".encode())
    return digest.hexdigest()
