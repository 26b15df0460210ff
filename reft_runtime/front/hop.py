"""Awaits what is made in threads for a caller who may leave, and for which it may have to wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Protocol, TypeVar

T = TypeVar("T")


class Held(Protocol):
    """What is acquired for a request, and ready some time later; see `Holding`."""

    @property
    def ready(self) -> Future[None]:
        """Done when it can be used."""

    def release(self) -> None:
        """Let go of it, or wait for it no longer."""


H = TypeVar("H", bound=Held)


class Runner(Protocol):
    """Runs a call in a thread, and returns its result."""

    def __call__(self, call: Callable[[], T], /) -> Awaitable[T]:
        """Run `call`, which goes on if the caller leaves."""


async def unless_left(making: Awaitable[T], undo: Callable[[T], object]) -> T:
    """Return the result of `making`; if the caller is cancelled, pass the result to `undo` instead.

    `making` goes on after a cancellation, because a thread cannot be stopped. `undo` releases what
    it acquired for a caller who has left.
    """
    made = asyncio.ensure_future(making)

    def let_go(_: object) -> None:
        if not made.cancelled() and made.exception() is None:
            undo(made.result())

    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        made.add_done_callback(let_go)
        raise


async def in_thread(
    call: Callable[[], T], undo: Callable[[T], object], run: Runner | None = None
) -> T:
    """Return the result of `call` in a worker thread; if the caller leaves, pass it to `undo`.

    `run` finds the thread, by default asyncio does.
    Also where the whole event loop ends, which cancels all of its tasks: the thread goes on, and
    gives back itself what nobody waits for.
    """
    lock, left, made = threading.Lock(), False, list[T]()

    def calling() -> T:
        result = call()
        with lock:
            if not left:
                made.append(result)
                return result
        undo(result)
        return result

    try:
        return await (run or asyncio.to_thread)(calling)
    except BaseException:
        with lock:
            left = True
        for result in made:
            undo(result)
        raise


async def in_turn(
    acquire: Callable[[], H],
    prepare: Callable[[H], T],
    undo: Callable[[T], object],
    run: Runner | None = None,
) -> T:
    """Return what `prepare` makes of what was acquired, and release that.

    Both are called in a worker thread; where what was acquired is not ready at once, no thread
    waits for it. If the caller is cancelled, what was prepared is passed to `undo`, as
    `in_thread` does, which takes `run`.
    """

    def prepared(held: H) -> T:
        try:
            return prepare(held)
        finally:
            held.release()

    def begun() -> tuple[H, T | None]:
        held = acquire()
        return held, (prepared(held) if held.ready.done() else None)

    def let_go(made: tuple[H, T | None]) -> None:
        held, result = made
        held.release()
        if result is not None:
            undo(result)

    held, result = await in_thread(begun, let_go, run)
    if result is not None:
        return result
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ready.set)

    held.ready.add_done_callback(tell)
    try:
        await ready.wait()
        return await in_thread(lambda: prepared(held), undo, run)
    except BaseException:
        held.release()
        raise
