"""Threads for work that would hold up the event loop, started before they are needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

THREADS = min(32, (os.cpu_count() or 1) + 4)
"""Number of threads that asyncio's own pool has by default."""


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
