"""Loaded by workers of one test: a shard with a zebra kills them, as one that needs too much memory would."""

import os
import signal

from pipeline import assignment

_compute = assignment._Desk.compute


def _deadly(self: assignment._Desk, key: str, rows: assignment.Indices) -> None:
    if any("zebra" in text for text in self._rows.take(rows).texts.to_pylist()):
        os.kill(os.getpid(), signal.SIGKILL)
    _compute(self, key, rows)


assignment._Desk.compute = _deadly  # type: ignore[method-assign]
