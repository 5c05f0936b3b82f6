"""A dataset and a teacher -> caches/NAME, sealed; only shards that are missing are computed."""

import json
from functools import partial

from pipeline.capture.capture import capture_cache, capture_summary
from pipeline.config.load import load_params, pick_entry
from stages import cli, paths
from stages.teacher_guard import check_not_done_elsewhere
from storage.shared_store import open_store


def main(name: str) -> None:
    """Capture one cache."""
    params = load_params()
    entry = pick_entry(params.caches, "caches", name)
    teacher = paths.TEACHERS / entry.teacher
    captured = capture_cache(
        name,
        entry,
        paths.DATA / entry.dataset,
        teacher,
        paths.CACHES / name,
        open_store(paths.STORE, params.workers.store),
        before_teacher=partial(check_not_done_elsewhere, f"cache@{name}", name),
        workers=params.workers,
    )
    paths.CAPTURE.mkdir(parents=True, exist_ok=True)
    summary = capture_summary(name, entry, captured, teacher)
    (paths.CAPTURE / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
