"""The verify stage: whether a cache is complete, fits its entry, and holds what its teacher gives today."""

from pathlib import Path
from typing import Any

from pipeline.capture.identity import capture_identity, with_tables
from pipeline.capture.replay import replay
from pipeline.capture.teacher_weights import check_weights
from pipeline.config.caches import CacheEntry
from pipeline.data.rows import load_rows
from pipeline.runtime.progress import bar
from storage import Cache
from storage.spec import Identity
from storage.verify import verify


def verify_cache(name: str, cache: Cache, entry: CacheEntry, dataset: Path, teacher: Path) -> dict[str, Any]:
    """Verify fit, coverage, every byte, and a replay of the teacher. Returns a deterministic record.

    Raises SpecMismatch or another CacheError that names the first fault.
    """
    rows = load_rows(dataset)
    cache.check(
        f"caches.{name}",
        identity=_expected_identity(cache, entry, teacher),
        labels=rows.label_names,
        row_ids=rows.row_ids,
        whole=True,
        advice=f"Rebuild it with `dvc repro cache@{name}`: shards that still fit are kept.",
    )
    check_weights(name, cache, entry.weights, teacher)
    with bar(f"verifying {name}", cache.num_rows, "rows") as advance:
        counts = verify(cache, advance)
    replayed = replay(cache, rows, teacher)
    return {"cache": name, "manifest": cache.manifest_sha256, **counts._asdict(), "replayed_rows": replayed}


def _expected_identity(cache: Cache, entry: CacheEntry, teacher: Path) -> Identity:
    """The identity that a cache of this entry has; its own fitted tables are accepted, whatever they are.

    With precision auto its own precision is accepted too: it may have been captured on other hardware.
    """
    own = cache.identity.spec
    ranks = None if own.sparse is None else own.sparse.ranks
    basis = None if own.hidden is None else own.hidden.basis
    expected = with_tables(capture_identity(entry, teacher), ranks, basis)
    if entry.precision == "auto":
        spec = expected.spec.model_copy(update={"precision": own.precision})
        expected = expected.model_copy(update={"spec": spec})
    return expected
