"""Runs what needs an event loop from a thread without one, or with one that runs (a notebook)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_apart(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in a thread and an event loop of its own, and return its result.

    What ends the waiting, such as `KeyboardInterrupt`, cancels the coroutine, and is raised when
    it has ended.
    """
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    ended = threading.Event()

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))
        finally:
            loop.close()
            ended.set()

    threading.Thread(target=run, name="reft-apart").start()
    try:
        ended.wait()
    except BaseException:
        with suppress(RuntimeError):  # it has just ended, and its loop is closed
            loop.call_soon_threadsafe(task.cancel)
        ended.wait()
        raise
    return task.result()
