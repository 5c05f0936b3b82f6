"""A dataset and a teacher -> caches/NAME, sealed. Only missing shards are computed."""

from functools import partial

from pipeline.capture.capture import capture_cache
from pipeline.capture.job import CaptureJob
from pipeline.capture.seal import capture_summary
from pipeline.config.load import load_params, pick_entry
from pipeline.runtime.files import write_json
from stages import cli, paths
from stages.teacher_guard import check_not_done_elsewhere
from storage.shared_store import open_store


def main(name: str) -> None:
    """Capture one cache."""
    params = load_params()
    entry = pick_entry(params.caches, "caches", name)
    job = CaptureJob(
        name=name,
        entry=entry,
        dataset=paths.DATA / entry.dataset,
        teacher=paths.TEACHERS / entry.teacher,
        out=paths.CACHES / name,
        store=open_store(paths.STORE, params.workers.store),
        before_teacher=partial(check_not_done_elsewhere, f"cache@{name}", name),
        workers=params.workers,
    )
    captured = capture_cache(job)
    write_json(capture_summary(job, captured), paths.CAPTURE / f"{name}.json")


if __name__ == "__main__":
    cli.run(main)
