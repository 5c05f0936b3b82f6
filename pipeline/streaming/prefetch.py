"""Threads that read ahead of the training thread, for items of any kind.

Items come out in the order in which they went in, for any number of threads.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


@contextlib.contextmanager
def decode_ahead(calls: Iterable[Callable[[], Item]], readers: int) -> Iterator[Iterator[Item]]:
    """The results of these calls, in their order; all readers except one run them, the last makes batches.

    Each thread has one call running or waiting: as many shards as threads are in memory besides the
    window. Errors are raised here, in their place.
    """
    if readers < 2:
        yield (call() for call in calls)
        return
    with ThreadPoolExecutor(readers - 1, "reader") as pool:
        waiting: deque[Future[Item]] = deque()

        def in_order() -> Iterator[Item]:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) == readers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        try:
            yield in_order()
        finally:
            for future in waiting:
                future.cancel()


def prefetch(
    items: Iterable[Item], max_bytes: int, size: Callable[[Item], int]
) -> Generator[Item, None, None]:
    """The same items, produced by a thread that stays at most `max_bytes` (or one item) ahead.

    Its errors are raised here, in their place. Closing the iterator early ends the thread.
    """
    ahead = _Ahead(max_bytes)
    ready: queue.SimpleQueue[Item | Exception | None] = queue.SimpleQueue()

    def produce() -> None:
        try:
            for item in items:
                if not ahead.wait_and_take(size(item)):
                    return
                ready.put(item)
            ready.put(None)
        except Exception as error:
            ready.put(error)  # raised where the item would have been used

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            ahead.give_back(size(item))
            yield item
    finally:
        ahead.close()
        thread.join()


class _Ahead:
    """The bytes that a producer is ahead of its consumer, with a limit at which it waits."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._closed = limit, 0, False
        self._changed = threading.Condition()

    def wait_and_take(self, num_bytes: int) -> bool:
        """Wait until the bytes fit, and count them; False where the consumer is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._held or self._held + num_bytes <= self._limit
            )
            self._held += num_bytes
            return not self._closed

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._held -= num_bytes
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
