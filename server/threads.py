"""Threads for work that would hold up the event loop, started before they are needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

THREADS = min(32, (os.cpu_count() or 1) + 4)
"""As many as asyncio takes by default."""


def started_pool(threads: int = THREADS, name: str = "reft-request") -> ThreadPoolExecutor:
    """A pool that starts no thread later: without memory for one a request would fail half begun,
    its work in the queue and nobody waiting for it."""
    pool = ThreadPoolExecutor(threads, name)
    together = Barrier(threads)
    for started in [pool.submit(together.wait) for _ in range(threads)]:
        started.result()
    return pool
