"""The cache as an artifact: a teacher's outputs on disk, and the checks that guard them.

This package needs numpy, pyarrow, zarr, pydantic and fsspec. It never imports torch, transformers or dask, so
a cache can be opened, checked and read on a machine that has none of them. docs/cache-format.md specifies the
format.

    from storage import Cache
    cache = Cache.open("caches/reviews")
    cache.labels, cache.num_rows
    for shard in cache.shards:
        rows = cache.read(shard)          # row_ids, input_hashes, num_tokens, and logits or entries
"""

from storage.errors import StillroomError
from storage.reader import Cache

__all__ = ["Cache", "StillroomError"]
