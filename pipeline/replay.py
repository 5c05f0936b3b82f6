"""The verify stage: is a cache whole, does it fit, and does its teacher still say what it holds?"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline import capture, config, engine, hardware, teachers
from pipeline.data import Rows, load_rows
from pipeline.progress import bar
from storage import Cache
from storage.entries import Entries, concatenate
from storage.errors import Mismatch, SpecMismatch, TeacherError
from storage.records import LogitRows
from storage.spec import SparseCodec
from storage.verify import verify

REPLAY_ROWS = 256
# How far a replayed logit may lie from the cached one, relative to the largest logit of its row: rounding of
# other batch shapes and processors in float32; two units in the last place of bfloat16 through a dozen
# layers.
TOLERANCE = {"float32": 1e-3, "bfloat16": 6e-2}
# How far the square root of a replayed probability may lie from that of a cached entry, beyond the same
# rounding: a step of the compact layout.
ENTRY_STEP = 0.03
# The least share of sampled ids that a replay must draw again: a draw near the edge of two ids can tip over.
SAME_DRAWS = {"float32": 0.98, "bfloat16": 0.6}


def check(name: str, cache: Cache, entry: config.CacheEntry, dataset: Path, teacher: Path) -> dict[str, Any]:
    """Verify everything that can be: fit, coverage, every byte, and a replay. Returns a deterministic record.

    Raises SpecMismatch or another CacheError that names the first fault.
    """
    rows = load_rows(dataset)
    ranks = None if cache.codec == "dense" else cache.codec.ranks  # any table of frequent ids is good
    expected = capture.identity(entry, teacher, ranks)
    if entry.precision == "auto":  # captured elsewhere, perhaps: its own word for its precision is good
        spec = expected.spec.model_copy(update={"precision": cache.identity.spec.precision})
        expected = expected.model_copy(update={"spec": spec})
    advice = f"Rebuild it with `dvc repro cache@{name}`: shards that still fit are kept."
    cache.check(
        f"caches.{name}",
        identity=expected,
        labels=rows.label_names,
        row_ids=rows.row_ids,
        whole=True,
        advice=advice,
    )
    with bar(f"verifying {name}", cache.num_rows, "rows") as advance:
        counts = verify(cache, advance)
    replayed = replay(cache, rows, teacher)
    return {"cache": name, "manifest": cache.manifest_sha256, **counts._asdict(), "replayed_rows": replayed}


def replay(cache: Cache, rows: Rows, teacher: Path) -> int:
    """Ask the teacher again about a sample of rows that the cache's content chooses; return how many.

    Raises SpecMismatch where a row's tokens or logits are not those that were cached, within the codec's
    error.
    """
    cached = [cache.read(shard) for shard in cache.shards]
    place = {row: index for index, row in enumerate(rows.row_ids.to_pylist())}
    ids = pa.concat_arrays([part.row_ids for part in cached]).to_pylist()
    hashes = pa.concat_arrays([part.input_hashes for part in cached]).to_pylist()
    generator = np.random.PCG64(np.random.SeedSequence(int(cache.manifest_sha256, 16)))
    chosen = np.sort(np.argsort(generator.random_raw(len(ids)), kind="stable")[:REPLAY_ROWS])
    reader = teachers.reader(teacher)
    names = [ids[i] for i in chosen]
    tokens = reader.read([rows.texts[place[name]].as_py() for name in names], names)
    faults = [
        Mismatch(f"row {ids[i]}: token ids", hashes[i], found)
        for i, found in zip(chosen, tokens.hashes().to_pylist(), strict=True)
        if hashes[i] != found
    ]
    precision = cache.identity.spec.precision
    hardware.pin_threads(hardware.num_cores())
    model = teachers.load(teacher, pad_token_id=reader.pad_id)
    said = engine.infer(model, tokens, np.arange(len(chosen)), reader.pad_id, precision).logits
    if said.shape[1] != len(cache.labels):
        raise TeacherError(
            f"the teacher gives {said.shape[1]} logits a row, the cache has {len(cache.labels)}."
        )
    if cache.codec == "dense":
        logits = np.concatenate([part.logits for part in cached if isinstance(part, LogitRows)])[chosen]
        faults += _other_logits(names, logits, said, TOLERANCE[precision])
    else:
        parts = [part.entries for part in cached if not isinstance(part, LogitRows)]
        faults += _other_entries(names, concatenate(parts).take(chosen), said, cache.codec, precision)
    if faults:
        advice = "Other weights or other code made it. Rebuild it; raise CAPTURE_VERSION where code changed."
        raise SpecMismatch(f"{cache.path} is not what its teacher says today", faults[:10], advice)
    return len(chosen)


def _other_logits(
    names: list[str], cached: npt.NDArray[np.float32], said: npt.NDArray[np.float32], tolerance: float
) -> list[Mismatch]:
    scale = np.maximum(np.abs(said).max(axis=1), 1.0)
    error = np.abs(said - cached).max(axis=1) / scale
    wrong = np.flatnonzero(~(error <= tolerance))
    return [Mismatch(f"row {names[i]}: logits", cached[i].tolist(), said[i].tolist()) for i in wrong]


def _other_entries(
    names: list[str], cached: Entries, said: npt.NDArray[np.float32], codec: SparseCodec, precision: str
) -> list[Mismatch]:
    """Entries that the teacher would not give again: exact ones by their probability, sampled ones by drawing
    them again with the same random numbers.
    """
    probs = torch.softmax(torch.from_numpy(said).double(), -1).numpy()
    now = probs[cached.positions, cached.ids]
    rank = np.arange(len(cached.ids)) - np.repeat(cached.offsets[:-1], cached.counts)
    exact = rank < np.repeat(cached.num_exact, cached.counts)
    error = np.abs(np.sqrt(now) - np.sqrt(cached.weights)) > ENTRY_STEP + TOLERANCE[precision]
    faults = [
        Mismatch(f"row {names[position]}: id {token}", float(weight), float(probability))
        for position, token, weight, probability in zip(
            *(column[error & exact] for column in (cached.positions, cached.ids, cached.weights, now)),
            strict=True,
        )
    ]
    if exact.all():
        return faults
    again, _ = capture.encode(codec, said, names)
    width = said.shape[1]
    drawn = set((again.positions * width + again.ids).tolist())
    sampled = (cached.positions * width + cached.ids)[~exact]
    same = sum(entry in drawn for entry in sampled.tolist()) / len(sampled)
    if same < SAME_DRAWS[precision]:
        faults.append(Mismatch("sampled ids drawn again", "all", f"{same:.1%} of them"))
    return faults
