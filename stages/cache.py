"""A dataset and a teacher -> caches/NAME, sealed; only shards that are missing are computed."""

from functools import partial

from pipeline.capture.capture import capture_cache, capture_summary
from pipeline.config.load import load_params, pick_entry
from pipeline.runtime.files import write_json
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
    summary = capture_summary(name, entry, captured, teacher)
    write_json(summary, paths.CAPTURE / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
