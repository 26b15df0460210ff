"""Awaits a result that must be released, made in a thread for a caller who may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


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
