"""Which checkpoint belongs to which training: everything that decides its numbers, the code included.

The machine is left out, so that a training continues after it was moved to another one.
"""

from pathlib import Path

import torch

from pipeline.runtime import hardware
from pipeline.runtime.files import content_digest
from pipeline.training.checkpoints import Checkpointer
from pipeline.training.job import Job, start_directory
from storage.fingerprints import sha256_json
from storage.mixture import open_cache

VERSION = 1  # of the content of a checkpoint
CODE = ("pipeline", "storage")  # packages: other code may train differently


def checkpointer_of(job: Job) -> Checkpointer | None:
    """The checkpointer of a job; None where it has no checkpoints."""
    directory = job.paths.checkpoints
    if directory is None or job.checkpoint_minutes is None:
        return None
    name = f"seed-{job.seed}"
    if job.trial is not None:
        name = f"fold-{job.trial.fold}-{sha256_json(job.recipe.model_dump(mode='json'))[:16]}"
    label = f"{job.paths.out.name}, {job.label}"
    return Checkpointer(
        directory / f"{name}.safetensors", label, deciding_facts(job), 60 * job.checkpoint_minutes
    )


def deciding_facts(job: Job) -> dict[str, str]:
    """Everything that decides a training, by the names that messages have for it."""
    if job.parts:
        found = {"weights": str({task: part.weight for task, part in job.parts.items()})}
        for task, own in job.one_by_one.items():
            found |= {f"{fact} of {task}": value for fact, value in deciding_facts(own).items()}
        return found
    init = start_directory(job.paths.init, job.seed) if job.paths.init else None
    code = [Path(__file__).parents[2] / package for package in CODE]
    return {
        "format": str(VERSION),
        "seed": str(job.seed),
        "fold": "none" if job.trial is None else f"{job.trial.fold} of {job.trial.folds}",
        "student": sha256_json(job.student.model_dump(mode="json")),
        "recipe": sha256_json(job.recipe.model_dump(mode="json")),
        "cache": open_cache(job.paths.cache, job.paths.local_bytes).manifest_sha256,
        "dataset": content_digest(job.paths.dataset),
        "tokenizer": content_digest(job.paths.out / "tokenizer"),
        "start": content_digest(init) if init else "none",
        "code": content_digest(*code, pattern="*.py"),
        "torch": torch.__version__,
        "device": hardware.device().type,
        "number of processes": str(hardware.ranks()[1]),
    }
