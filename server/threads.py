"""Threads for work that would hold up the event loop, started before they are needed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar
from weakref import WeakValueDictionary

T = TypeVar("T")

THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Number of threads that asyncio's own pool has by default."""


class TenantThreads:
    """Threads of asyncio's pool, of which one tenant has at most `most` at once.

    What is more waits, in order of arrival; so nobody keeps others out by large requests. All
    methods belong to one event loop.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, tenant: str, call: Callable[[], T]) -> T:
        """Return the result of `call`; if the caller leaves, its thread keeps the place."""
        places = self._places.get(tenant)
        if places is None:
            places = self._places[tenant] = asyncio.Semaphore(self._most)
        await places.acquire()
        try:
            done = asyncio.ensure_future(asyncio.to_thread(call))
        except BaseException:
            places.release()
            raise
        done.add_done_callback(lambda _: places.release())
        return await asyncio.shield(done)


def started_pool(threads: int = THREADS, name: str = "reft-request") -> ThreadPoolExecutor:
    """Make a pool whose threads have all been started.

    A thread started later could fail for lack of memory. The request would then fail with its work
    still in the queue and nobody waiting for it.
    """
    pool = ThreadPoolExecutor(threads, name)
    together = Barrier(threads)
    for started in [pool.submit(together.wait) for _ in range(threads)]:
        started.result()
    return pool
