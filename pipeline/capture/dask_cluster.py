"""A capture on Dask distributed: shards as tasks for processes of this machine, or for those of a scheduler.

The only file that knows Dask, imported only where a capture is not inline; worker.py has what workers do. Two
shards are submitted for each worker, so that none waits. A result only means that the shard is in the store,
and it is read from there. A shard that failed (an error, four dead workers, or a timeout) is tried again when
all others are done, alone on its worker, so that it takes no other shard down with it; after three rounds the
capture ends with an error that names it.
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

from pipeline.capture.worker import PlannedShard, WorkerJob, compute_shard
from pipeline.config.params import Workers
from pipeline.runtime import hardware
from pipeline.runtime.progress import bar, log
from storage.errors import ConfigError, ShardsFailed, ShardUnwritten, StillroomError, StoreFull, WorkersLost
from storage.writer import Store, StoredShard

ROUNDS = 3  # how often a shard is tried
FAILED_IN_A_ROW = 20  # shards without a finished one between them: the fault is not in the shards
WAIT_FOR_WORKERS = 60  # seconds until the first worker has connected
CHECK_SECONDS = 1.0  # between checks for shards that are late
RESTART_SECONDS = 30  # for a worker to be killed and started again
KEPT = "Finished shards are kept. Fix the cause and run the same command again: it continues there."


class _Submitted(NamedTuple):
    shard: PlannedShard
    future: Future
    since: float  # seconds of monotonic()


def compute_on_cluster(
    name: str, job: WorkerJob, shards: Sequence[PlannedShard], workers: Workers
) -> list[StoredShard]:
    """Compute these shards on workers, and return them from the store.

    Raises ShardsFailed, which names every shard that failed in all rounds; StoreFull; WorkersLost.
    """
    finished: list[StoredShard] = []
    with _client(workers, job.threads) as client, _explain_loss(workers.capture):
        log(f"{name}: {len(shards):,} shards for {_count(client)} workers; dashboard: {_page(client)}")
        positions = sum(shard.positions for shard in shards)
        with bar(f"capturing {name}", positions, "positions", window=workers.shard_timeout) as advance:

            def collect(shard: PlannedShard) -> None:
                stored = Store(job.store).shard(job.identity, shard.key)
                if stored is None:
                    raise ShardUnwritten(
                        f"a worker wrote {shard.label}, but it is not in {job.store}.\n"
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
    named = "\n".join(f"  {shard.label}: {failed[shard.key]}" for shard in left)
    raise ShardsFailed(
        f"caches.{name}: {len(left)} of {len(shards)} shards failed {ROUNDS} times, all others are finished."
        f"\n{named}\n{KEPT}"
    )


class _Round:
    """Submits every shard once; returns those that failed, with their errors."""

    def __init__(
        self, client: Client, job: WorkerJob, seconds: float, collect: Callable[[PlannedShard], None]
    ) -> None:
        self._client, self._job, self._seconds, self._collect = client, job, seconds, collect
        self._out: dict[str, _Submitted] = {}  # by the key of its future
        self._back: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._failed: dict[str, str] = {}  # shard key -> error
        self._in_a_row = 0

    def run(self, shards: Sequence[PlannedShard], ahead: int) -> dict[str, str]:
        """Shard key -> error of each that failed. At most `ahead` shards a worker are submitted at once."""
        waiting = list(reversed(shards))
        while True:
            while waiting and len(self._out) < ahead * max(1, _count(self._client)):
                self._submit(waiting.pop())
            if not self._out:
                return self._failed
            with contextlib.suppress(queue.Empty):
                self._receive(self._back.get(timeout=CHECK_SECONDS))
            self._restart_stalled()
            self._replace_lost()

    def _submit(self, shard: PlannedShard) -> None:
        # A new name each time: Dask keeps the outcome of a name.
        name = f"shard-{shard.key[:12]}-{uuid.uuid4().hex}"
        future = self._client.submit(compute_shard, self._job, shard.key, shard.rows, key=name, pure=False)
        self._out[name] = _Submitted(shard, future, monotonic())
        future.add_done_callback(self._back.put)

    def _receive(self, future: Future) -> None:
        out = self._out.pop(future.key, None)
        if out is None:
            return  # it was late: it is tried again
        if future.status in ("cancelled", "lost"):
            raise WorkersLost(
                f"workers.capture: the scheduler went away while {out.shard.label} was submitted.\n{KEPT}"
            )
        error = future.exception()
        if error is None:
            self._in_a_row = 0
            self._collect(out.shard)
        elif isinstance(error, StoreFull):
            raise error
        else:
            self._fail(out.shard, _describe(error))

    def _fail(self, shard: PlannedShard, error: str) -> None:
        self._failed[shard.key] = error
        self._in_a_row += 1
        if self._in_a_row == FAILED_IN_A_ROW:
            raise ShardsFailed(
                f"{FAILED_IN_A_ROW} shards failed one after the other, and no worker finished one between.\n"
                f"  the last one, {shard.label}: {error}\n{KEPT}"
            )

    def _restart_stalled(self) -> None:
        """Take shards that are late from their workers, and restart these workers."""
        late = {n for n, out in self._out.items() if monotonic() - out.since > self._seconds}
        if not late:
            return
        if not _count(self._client):
            raise WorkersLost(f"no worker is left, and {len(self._out)} shards are submitted.\n{KEPT}")
        busy = self._client.processing()
        stalled = [worker for worker, names in busy.items() if late.intersection(names)]
        for name in late:
            out = self._out.pop(name)
            self._fail(out.shard, f"not finished within {self._seconds:,} seconds (workers.shard_timeout)")
            out.future.cancel()
        again = monotonic()
        for worker in stalled:
            log(f"worker {worker} has stalled: it is restarted, and its shards go to other workers")
            for name in set(busy[worker]) & set(self._out):
                self._out[name] = self._out[name]._replace(since=again)
        known = self._client.scheduler_info()["workers"]
        with_nanny = [worker for worker in stalled if known.get(worker, {}).get("nanny")]
        self._client.restart_workers(with_nanny, timeout=RESTART_SECONDS, raise_for_error=False)
        self._client.retire_workers([worker for worker in stalled if worker not in with_nanny])

    def _replace_lost(self) -> None:
        """Start local workers again whose nannies gave up, as they do when a worker dies while it starts."""
        cluster = self._client.cluster
        if cluster is not None and _count(self._client) < len(cluster.worker_spec):
            cluster.sync(_forget_ended, cluster)
            cluster.scale(len(cluster.worker_spec))


def worker_environments(
    workers: Workers, devices: Sequence[str], cores: int, threads: int
) -> list[dict[str, str]]:
    """The environment of each local process: one a GPU of `devices`, else as many as fit the cores.

    Raises ConfigError where more GPUs are wanted than there are, and where threads would be guessed.
    """
    if workers.gpus is not None and workers.gpus > len(devices):
        raise ConfigError(
            f"workers.gpus: {workers.gpus} are wanted, and {len(devices)} are visible here.\n"
            "Lower it, or leave it out to use all; CUDA_VISIBLE_DEVICES hides others."
        )
    used = devices[: workers.gpus]
    number = workers.processes or len(used) or max(1, cores // threads)
    if not used and workers.threads is None and number > 1:
        raise ConfigError(
            f"workers.processes: {number} processes would each use all {cores} cores of this machine.\n"
            f"Write workers.threads too, for example {max(1, cores // number)}. A capture in one process "
            "with as many threads has the same bytes."
        )
    blank = {"CUDA_VISIBLE_DEVICES": ""}
    return [{"CUDA_VISIBLE_DEVICES": used[i % len(used)]} if used else blank for i in range(number)]


@contextlib.contextmanager
def _client(workers: Workers, threads: int) -> Iterator[Client]:
    """A client of the scheduler at the address, or of a local one whose workers end with it."""
    if workers.capture != "local":
        with _explain_loss(workers.capture):
            client = Client(workers.capture, set_as_default=False)
        with client:
            with _explain_loss(workers.capture):
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
    # Read when torch is imported; Dask would set them to 1.
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    settings = {f"distributed.nanny.pre-spawn-environ.{name}": threads for name in names}
    # Dask would stop nannies that need more than 15 seconds to bring a worker back.
    with dask.config.set(settings | {"distributed.deploy.lost-worker-timeout": "1 day"}):
        with SpecCluster(workers=spec, scheduler=scheduler, silence_logs=logging.ERROR) as cluster:
            with Client(cluster, set_as_default=False) as client:
                yield client


async def _forget_ended(cluster: SpecCluster) -> None:
    """Remove nannies that gave up from the cluster's list of workers. Runs in its event loop."""
    for name, nanny in list(cluster.workers.items()):
        if nanny.status in (Status.closed, Status.failed):
            del cluster.workers[name]


@contextlib.contextmanager
def _explain_loss(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, StillroomError):
            raise
        raise WorkersLost(
            f"workers.capture: {where}: a scheduler with workers cannot be reached: "
            f"{_describe(error)}\n{KEPT}"
        ) from error


def _page(client: Client) -> str:
    """The address of the dashboard, which needs bokeh; else that of the scheduler."""
    shown = "dashboard" in client.scheduler_info()["services"] and importlib.util.find_spec("bokeh")
    return str(client.dashboard_link if shown else client.scheduler.address)


def _count(client: Client) -> int:
    return len(client.nthreads())


def _describe(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return f"{error.allowed_failures + 1} workers died while they computed it; was their memory enough?"
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
