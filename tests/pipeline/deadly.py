"""Loaded by workers of one test: a shard with a zebra kills them, as one that needs too much memory would."""

import os
import signal

from pipeline.capture.worker import Indices, WorkerState

_compute = WorkerState.compute


def _deadly(self: WorkerState, key: str, rows: Indices) -> None:
    if any("zebra" in text for text in self._rows.take(rows).texts.to_pylist()):
        os.kill(os.getpid(), signal.SIGKILL)
    _compute(self, key, rows)


WorkerState.compute = _deadly  # type: ignore[method-assign]
