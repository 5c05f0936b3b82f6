"""The cache stage: plan the missing shards -> answer them with the teacher -> seal the cache.

Finished shards of the same identity whose rows are all wanted are reused, largest first; the remaining rows
are cut, in dataset order, into new shards. So a killed capture continues where it was, appended rows cost
themselves alone, and two caches of one teacher share what they have in common. The teacher is loaded when the
first missing shard is computed, and not at all where none is missing.
"""

from pipeline.capture.answer import answer
from pipeline.capture.job import Captured, CaptureJob
from pipeline.capture.plan import plan
from pipeline.capture.seal import seal_cache


def capture_cache(job: CaptureJob) -> Captured:
    """Have the teacher answer every row that is in no finished shard, and seal the cache into `job.out`."""
    planned = plan(job)
    return seal_cache(planned, answer(planned))
