"""A dataset and a teacher -> caches/NAME, sealed; only shards that are missing are computed."""

import json
from functools import partial

from pipeline import capture, config
from stages import cli, paths
from stages.elsewhere import refuse_if_done_elsewhere
from storage.shared_store import open_store


def main(name: str) -> None:
    """Capture one cache."""
    params = config.load()
    entry = config.pick(params.caches, "caches", name)
    teacher = paths.TEACHERS / entry.teacher
    captured = capture.capture(
        name,
        entry,
        paths.DATA / entry.dataset,
        teacher,
        paths.CACHES / name,
        open_store(paths.STORE, params.workers.store),
        before_teacher=partial(refuse_if_done_elsewhere, f"cache@{name}", name),
        workers=params.workers,
    )
    paths.CAPTURE.mkdir(parents=True, exist_ok=True)
    summary = capture.summary(name, entry, captured, teacher)
    (paths.CAPTURE / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
