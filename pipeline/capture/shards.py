"""Answers shards with the teacher and writes them into the store."""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from pipeline.capture.fitted_tables import FittedTables
from pipeline.engines.engine import EngineInputs, EngineOutput, TeacherEngine
from pipeline.engines.inference import Advance, Indices
from pipeline.runtime import hardware
from storage import compact
from storage.errors import ShardUnwritten, StoreFull
from storage.fingerprints import Sha256
from storage.records import EntryRows
from storage.spec import Identity, shard_key
from storage.writer import Store, StoredShard


def key_of_rows(inputs: EngineInputs, identity: Identity, part: Indices) -> Sha256:
    """The key of the shard that these rows make."""
    return shard_key(identity, inputs.row_ids.take(part).to_pylist(), inputs.inputs.hashes(part).to_pylist())


class ShardWriter(NamedTuple):
    """Writes the shards of one identity into a store."""

    store: Store
    identity: Identity
    tables: FittedTables

    def write(self, output: EngineOutput, seconds: float) -> StoredShard:
        """Pack and write one shard that the teacher took `seconds` for.

        Raises StoreFull or ShardUnwritten; both name the shard.
        """
        spec, tables = self.identity.spec, self.tables
        try:
            packed = None
            if tables.ranks is not None and isinstance(output.kept, EntryRows) and spec.sparse is not None:
                order = compact.Ranks(tables.ranks, spec.num_outputs)
                packed = spec.sparse.pack(output.kept.entries, order, output.noise)
            components = {name: b.components(output.hidden[name]) for name, b in tables.bases.items()}
            states = output.hidden | components
            return self.store.put(self.identity, output.kept, states, seconds, packed)
        except Exception as error:
            rows, hashes = output.kept.row_ids.to_pylist(), output.kept.input_hashes.to_pylist()
            key = shard_key(self.identity, rows, hashes)
            shard = f"shard {key[:12]} ({len(rows):,} rows, {rows[0]} to {rows[-1]})"
            if isinstance(error, StoreFull):
                raise StoreFull(f"{error}\nNot written: {shard}.") from error
            raise ShardUnwritten(
                f"{shard} could not be written: {type(error).__name__}: {error}\n"
                "Finished shards are kept. Fix the cause and run the same command again: it continues there."
            ) from error


def answer_and_write(
    engine: TeacherEngine, parts: Iterable[Indices], writer: ShardWriter, advance: Advance = lambda rows: None
) -> list[StoredShard]:
    """Answer the rows of each part with the teacher, and write each shard while the next one is answered.

    One shard at most waits to be written. An error of the writer ends the work; what was written stays.
    """
    written: list[StoredShard] = []
    engine.load()
    with ThreadPoolExecutor(1) as pool:
        writing: Future[StoredShard] | None = None
        for part in parts:
            started = hardware.compute_seconds()
            output = engine.answer(part, advance)
            seconds = hardware.compute_seconds() - started
            if writing is not None:
                written.append(writing.result())
            writing = pool.submit(writer.write, output, seconds)
        if writing is not None:
            written.append(writing.result())
    return written
