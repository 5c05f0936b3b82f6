"""Answers a shard with the teacher and writes it into the store."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.capture.plan import Indices
from pipeline.engines.engine import EngineInputs, EngineOutput, TeacherEngine
from pipeline.runtime import hardware
from storage import compact, hidden
from storage.errors import ShardUnwritten, StoreFull
from storage.fingerprints import Sha256
from storage.records import EntryRows
from storage.spec import Identity, shard_key
from storage.writer import Store, StoredShard


def key_of_rows(asked: EngineInputs, who: Identity, part: Indices) -> Sha256:
    """The name of the shard that these rows make."""
    return shard_key(who, asked.row_ids.take(part).to_pylist(), asked.inputs.hashes(part).to_pylist())


def answer_and_write(
    teaching: TeacherEngine,
    shards: Iterable[Indices],
    store: Store,
    who: Identity,
    ranks: Indices | None,
    advance: Callable[[int], None] = lambda rows: None,
    bases: Mapping[str, hidden.Basis] | None = None,
) -> list[StoredShard]:
    """Ask the teacher about the rows of each shard, and write it while the next one is asked about.

    One shard at most waits to be written. A writer's error ends the work and names its shard; what was
    written stays. Raises StoreFull or ShardUnwritten.
    """
    written: list[StoredShard] = []
    teaching.load()
    with ThreadPoolExecutor(1) as writer:
        writing: Future[StoredShard] | None = None
        for part in shards:
            started = hardware.compute_seconds()
            said = teaching.answer(part, advance)
            seconds = hardware.compute_seconds() - started
            if writing is not None:
                written.append(writing.result())
            writing = writer.submit(_put, store, who, said, ranks, bases or {}, seconds)
        if writing is not None:
            written.append(writing.result())
    return written


def _put(
    store: Store,
    who: Identity,
    said: EngineOutput,
    ranks: Indices | None,
    bases: Mapping[str, hidden.Basis],
    seconds: float,
) -> StoredShard:
    """Pack and write one shard. Any error says which one."""
    try:
        packed = None
        if ranks is not None and isinstance(said.kept, EntryRows) and who.spec.sparse is not None:
            order = compact.Ranks(ranks, who.spec.num_outputs)
            packed = who.spec.sparse.pack(said.kept.entries, order, said.noise)
        kept = said.hidden | {name: basis.components(said.hidden[name]) for name, basis in bases.items()}
        return store.put(who, said.kept, kept, seconds, packed)
    except Exception as error:
        rows, inputs = said.kept.row_ids.to_pylist(), said.kept.input_hashes.to_pylist()
        key = shard_key(who, rows, inputs)
        shard = f"shard {key[:12]} ({len(rows):,} rows, {rows[0]} to {rows[-1]})"
        if isinstance(error, StoreFull):
            raise StoreFull(f"{error}\nNot written: {shard}.") from error
        raise ShardUnwritten(
            f"{shard} could not be written: {type(error).__name__}: {error}\n"
            "Finished shards are kept. Mend the cause and run the same command again: it goes on from there."
        ) from error
