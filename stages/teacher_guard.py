"""Refuses to run a teacher whose result was finished on another machine.

dvc.lock travels with git, large outputs do not. Where dvc.lock says that a stage ran with just these inputs,
and its output is neither here nor in this clone's DVC cache, running the stage would compute the same result
a second time.
"""

import os
from pathlib import Path

from storage.errors import TeacherElsewhere

REBUILD = "STILLROOM_REBUILD"


def check_not_done_elsewhere(stage: str, cache: str = "NAME") -> None:
    """Raise TeacherElsewhere if dvc.lock has the output of `stage` for these inputs, and it is not here."""
    if os.environ.get(REBUILD) or not Path("dvc.lock").is_file():
        return
    from dvc.repo import Repo

    with Repo() as repo:
        found = repo.stage.load_one("dvc.yaml", stage)
        outputs = [out for out in found.outs if out.use_cache]
        # dep by dep: the stage's own changed_deps() takes the lock that the running `dvc repro` holds
        unchanged = not any(dep.status() for dep in found.deps)
        finished = outputs and all(out.hash_info for out in outputs) and unchanged
        here = all(out.hash_info and out.cache.exists(out.hash_info.value) for out in outputs)
    if finished and not here:
        raise TeacherElsewhere(
            f"{stage} was finished on another machine: dvc.lock has its result, and it is not here.\n"
            "To train students from the finished cache, without the teacher:\n"
            f"  dvc pull caches/{cache} && dvc repro --pull --allow-missing evaluate@RUN\n"
            f"To do the teacher's work again on this machine: {REBUILD}=1 dvc repro"
        )
