"""Awaits what is made in threads for a caller who may leave, and for which it may have to wait."""

from __future__ import annotations

import asyncio
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


async def in_turn(
    acquire: Callable[[], H], prepare: Callable[[H], T], undo: Callable[[T], object]
) -> T:
    """Return what `prepare` makes of what was acquired, and release that.

    Both are called in a worker thread; where what was acquired is not ready at once, no thread
    waits for it. If the caller is cancelled, what was prepared is passed to `undo`, as
    `unless_left` does.
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

    held, result = await unless_left(asyncio.to_thread(begun), let_go)
    if result is not None:
        return result
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(ready.set)

    held.ready.add_done_callback(tell)
    try:
        await ready.wait()
    except BaseException:
        held.release()
        raise
    return await unless_left(asyncio.to_thread(prepared, held), undo)
