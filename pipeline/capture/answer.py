"""Second step of a capture: the teacher answers the missing shards, here or on workers."""

from collections.abc import Iterator

from pipeline.capture.plan import CapturePlan
from pipeline.capture.shard_keys import Indices
from pipeline.capture.shards import ShardWriter, answer_and_write, key_of_rows
from pipeline.runtime.progress import bar
from storage.errors import ConfigError
from storage.fingerprints import content_fingerprint
from storage.writer import StoredShard


def answer(plan: CapturePlan) -> list[StoredShard]:
    """Every shard of the cache: the reused ones and the missing ones, which are computed now.

    `workers.capture` of the job chooses where; the bytes are the same. Raises ShardUnwritten or StoreFull,
    with workers also ShardsFailed and WorkersLost: finished shards stay in the store.
    """
    if not plan.missing:
        return plan.reused
    if plan.job.workers.capture == "inline":
        return plan.reused + _answer_inline(plan)
    return plan.reused + _answer_on_workers(plan)


def _answer_inline(plan: CapturePlan) -> list[StoredShard]:
    """The missing shards, computed by this process."""
    store, found = plan.job.store, list[StoredShard]()
    with bar(f"capturing {plan.job.name}", plan.num_missing, "rows") as advance:

        def still_missing() -> Iterator[Indices]:
            for part in plan.missing:
                held = store.shard(plan.identity, key_of_rows(plan.inputs, plan.identity, part))
                if held is None:
                    yield part
                else:  # another capture has finished it since the plan was made
                    found.append(held)
                    advance(len(part))

        writer = ShardWriter(store, plan.identity, plan.tables)
        return answer_and_write(plan.engine, still_missing(), writer, advance) + found


def _answer_on_workers(plan: CapturePlan) -> list[StoredShard]:
    """The missing shards, computed by other processes. Dask is imported here and not before."""
    from pipeline.capture.worker import WorkerJob, planned_shards

    job, store = plan.job, plan.job.store
    plan.inputs.before_loading()
    try:
        from pipeline.capture.dask_cluster import compute_on_cluster
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"workers.capture: {job.workers.capture} needs Dask, and {error.name} is not installed.\n"
            "Write inline, or install it: pip install --constraint constraints.txt --editable '.[cluster]'"
        ) from None
    worker_job = WorkerJob(
        entry=job.entry.model_copy(update={"precision": plan.identity.spec.precision}),
        dataset=job.dataset.resolve(),
        rows=content_fingerprint(plan.inputs.row_ids.to_pylist()),
        teacher=job.teacher.resolve(),
        store=store.root.resolve(),
        bare_identity=plan.bare_identity,
        identity=plan.identity,
        threads=job.threads,
    )
    shards = planned_shards(plan.inputs, plan.identity, plan.missing)
    found = compute_on_cluster(job.name, worker_job, shards, job.workers)
    store.sweep()  # what killed workers left
    store.fetch(plan.identity, ())  # workers write into the local store; a store at a URL is offered it now
    return [store.shard(plan.identity, shard.entry.key) or shard for shard in found]
