"""A capture on Dask distributed: shards as tasks for processes of this machine, or for those of a scheduler.

The only file that knows Dask, imported only where a capture is not inline. What workers do is said in
assignment.py. Two shards are handed out for each worker, so that none waits; what comes back says that the
shard is in the store, and the store is where it is read. A shard that failed (an error, four dead workers,
or too long) is tried again when all others are done, alone on its worker, so that no other is dragged along;
after three rounds it is named.
"""

import contextlib
import importlib.util
import logging
import queue
import uuid
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any, NamedTuple

import dask
from distributed import Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, Status

from pipeline.capture.worker import CaptureJob, PlannedShard, compute_shard
from pipeline.config.params import Workers
from pipeline.runtime import hardware
from pipeline.runtime.progress import bar, log
from storage.errors import ConfigError, ShardsFailed, ShardUnwritten, StillroomError, StoreFull, WorkersLost
from storage.writer import Store, StoredShard

ROUNDS = 3  # how often a shard is tried
FAILED_IN_A_ROW = 20  # so many shards, and none between them that came back: it is not the shards
WAIT_FOR_WORKERS = 60  # seconds for the first worker to come
LOOK_EVERY = 1.0  # seconds between looks at what is late
RESTART = 30  # seconds that a worker may need to be killed and started again
KEPT = "Finished shards are kept. Mend the cause and run the same command again: it goes on from there."


class _Out(NamedTuple):
    shard: PlannedShard
    future: Future
    since: float  # seconds of monotonic()


def compute_on_cluster(
    name: str, job: CaptureJob, shards: Sequence[PlannedShard], workers: Workers
) -> list[StoredShard]:
    """Have these shards computed, and return them as they lie in the store.

    Raises ShardsFailed, which names every shard that workers gave up; StoreFull; WorkersLost.
    """
    finished: list[StoredShard] = []
    with _client(workers, job.threads) as client, _loss_explained(workers.capture):
        log(f"{name}: {len(shards):,} shards for {_count(client)} workers, to be watched at {_page(client)}")
        positions = sum(shard.positions for shard in shards)
        with bar(f"capturing {name}", positions, "positions", window=workers.shard_timeout) as advance:

            def collect(shard: PlannedShard) -> None:
                stored = Store(job.store).shard(job.who, shard.key)
                if stored is None:
                    raise ShardUnwritten(
                        f"a worker wrote {shard.called}, and it is not in {job.store}.\n"
                        "Expected a store that all machines share: move the project to a directory that is."
                    )
                finished.append(stored)
                advance(shard.positions)

            failed: dict[str, str] = {}
            left = list(shards)
            for attempt in range(ROUNDS):
                failed = _Round(client, job, workers.shard_timeout, collect).run(left, 1 if attempt else 2)
                if not failed:
                    return finished
                left = [shard for shard in left if shard.key in failed]
                log(f"{name}: {len(left):,} shards failed in round {attempt + 1} of {ROUNDS}")
    named = "\n".join(f"  {shard.called}: {failed[shard.key]}" for shard in left)
    raise ShardsFailed(
        f"caches.{name}: {len(left)} of {len(shards)} shards failed {ROUNDS} times, all others are finished."
        f"\n{named}\n{KEPT}"
    )


class _Round:
    """Every shard is handed out once; those that fail are returned with what was said."""

    def __init__(
        self, client: Client, job: CaptureJob, seconds: float, collect: Callable[[PlannedShard], None]
    ) -> None:
        self._client, self._job, self._seconds, self._collect = client, job, seconds, collect
        self._out: dict[str, _Out] = {}  # by the key of its future
        self._back: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._failed: dict[str, str] = {}  # shard key -> error
        self._in_a_row = 0

    def run(self, shards: Sequence[PlannedShard], ahead: int) -> dict[str, str]:
        """What failed. At most `ahead` shards a worker are out at once."""
        waiting = list(reversed(shards))
        while True:
            while waiting and len(self._out) < ahead * max(1, _count(self._client)):
                self._hand_out(waiting.pop())
            if not self._out:
                return self._failed
            with contextlib.suppress(queue.Empty):
                self._take_back(self._back.get(timeout=LOOK_EVERY))
            self._relieve()
            self._replace_lost()

    def _hand_out(self, shard: PlannedShard) -> None:
        # A name of its own each time: Dask remembers what became of a name.
        name = f"shard-{shard.key[:12]}-{uuid.uuid4().hex}"
        future = self._client.submit(compute_shard, self._job, shard.key, shard.rows, key=name, pure=False)
        self._out[name] = _Out(shard, future, monotonic())
        future.add_done_callback(self._back.put)

    def _take_back(self, future: Future) -> None:
        out = self._out.pop(future.key, None)
        if out is None:
            return  # it was late, and is tried again
        if future.status in ("cancelled", "lost"):
            raise WorkersLost(
                f"workers.capture: the scheduler went away while {out.shard.called} was out.\n{KEPT}"
            )
        error = future.exception()
        if error is None:
            self._in_a_row = 0
            self._collect(out.shard)
        elif isinstance(error, StoreFull):
            raise error
        else:
            self._fail(out.shard, _said(error))

    def _fail(self, shard: PlannedShard, said: str) -> None:
        self._failed[shard.key] = said
        self._in_a_row += 1
        if self._in_a_row == FAILED_IN_A_ROW:
            raise ShardsFailed(
                f"{FAILED_IN_A_ROW} shards failed one after the other, and no worker finished any between.\n"
                f"  the last one, {shard.called}: {said}\n{KEPT}"
            )

    def _relieve(self) -> None:
        """Take shards that are late from their workers, and restart these."""
        late = {n for n, out in self._out.items() if monotonic() - out.since > self._seconds}
        if not late:
            return
        if not _count(self._client):
            raise WorkersLost(f"no worker is left, and {len(self._out)} shards are out.\n{KEPT}")
        busy = self._client.processing()
        stalled = [worker for worker, names in busy.items() if late.intersection(names)]
        for name in late:
            out = self._out.pop(name)
            self._fail(out.shard, f"no answer within {self._seconds:,} seconds (workers.shard_timeout)")
            out.future.cancel()
        again = monotonic()
        for worker in stalled:
            log(f"worker {worker} has stalled: it is restarted, and its shards go to others")
            for name in set(busy[worker]) & set(self._out):
                self._out[name] = self._out[name]._replace(since=again)
        known = self._client.scheduler_info()["workers"]
        nursed = [worker for worker in stalled if known.get(worker, {}).get("nanny")]
        self._client.restart_workers(nursed, timeout=RESTART, raise_for_error=False)
        self._client.retire_workers([worker for worker in stalled if worker not in nursed])

    def _replace_lost(self) -> None:
        """Start local workers anew whose nannies gave up, as they do when one dies while it starts."""
        cluster = self._client.cluster
        if cluster is not None and _count(self._client) < len(cluster.worker_spec):
            cluster.sync(_forget_ended, cluster)
            cluster.scale(len(cluster.worker_spec))


def worker_environments(
    workers: Workers, devices: Sequence[str], cores: int, threads: int
) -> list[dict[str, str]]:
    """The environment of each local process: on the GPUs called `devices` one a GPU, else so many as fit.

    Raises ConfigError where more GPUs are asked for than there are, and where threads would be guessed.
    """
    if workers.gpus is not None and workers.gpus > len(devices):
        raise ConfigError(
            f"workers.gpus: {workers.gpus} were asked for, and {len(devices)} are visible here.\n"
            "Lower it, or leave it out to use all; CUDA_VISIBLE_DEVICES hides others."
        )
    used = devices[: workers.gpus]
    number = workers.processes or len(used) or max(1, cores // threads)
    if not used and workers.threads is None and number > 1:
        raise ConfigError(
            f"workers.processes: {number} processes would each use all {cores} cores of this machine.\n"
            f"Write workers.threads too, for example {max(1, cores // number)}. A capture in one process "
            "with so many threads has the same bytes."
        )
    blank = {"CUDA_VISIBLE_DEVICES": ""}
    return [{"CUDA_VISIBLE_DEVICES": used[i % len(used)]} if used else blank for i in range(number)]


@contextlib.contextmanager
def _client(workers: Workers, threads: int) -> Iterator[Client]:
    """A client of the scheduler at the address, or of one with workers of its own, which end with it."""
    if workers.capture != "local":
        with _loss_explained(workers.capture):
            client = Client(workers.capture, set_as_default=False)
        with client:
            with _loss_explained(workers.capture):
                client.wait_for_workers(1, timeout=WAIT_FOR_WORKERS)
            yield client
        return
    loopback = {"host": "127.0.0.1", "silence_logs": logging.ERROR}
    common: dict[str, Any] = {"nthreads": 1, "memory_limit": None, **loopback}
    spec = {
        number: {"cls": Nanny, "options": {**common, "env": environment}}
        for number, environment in enumerate(
            worker_environments(workers, hardware.gpus(), hardware.num_cores(), threads)
        )
    }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    # Read when torch is imported; Dask would write 1.
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {f"distributed.nanny.pre-spawn-environ.{name}": threads for name in names}
    # Dask would stop nannies that need more than 15 seconds to bring a worker back.
    with dask.config.set(settings | {"distributed.deploy.lost-worker-timeout": "1 day"}):
        with SpecCluster(workers=spec, scheduler=scheduler, silence_logs=logging.ERROR) as cluster:
            with Client(cluster, set_as_default=False) as client:
                yield client


async def _forget_ended(cluster: SpecCluster) -> None:
    """Take nannies that gave up out of the cluster's books. Runs in its event loop."""
    for name, nanny in list(cluster.workers.items()):
        if nanny.status in (Status.closed, Status.failed):
            del cluster.workers[name]


@contextlib.contextmanager
def _loss_explained(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StillroomError):
            raise
        raise WorkersLost(
            f"workers.capture: {where}: a scheduler with workers cannot be reached: {_said(error)}\n{KEPT}"
        ) from error


def _page(client: Client) -> str:
    """The address of the dashboard, which needs bokeh; else that of the scheduler."""
    shown = "dashboard" in client.scheduler_info()["services"] and importlib.util.find_spec("bokeh")
    return str(client.dashboard_link if shown else client.scheduler.address)


def _count(client: Client) -> int:
    return len(client.nthreads())


def _said(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return f"{error.allowed_failures + 1} workers died over it; was their memory enough?"
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
