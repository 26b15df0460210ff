"""A result that somebody must let go of, made in a thread for an asker who may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def unless_left(making: Awaitable[T], undo: Callable[[T], object]) -> T:
    """Result of `making`, which goes on where its asker is cancelled; `undo` gets the result then.

    A thread cannot be stopped, so what it takes hold of for an asker who has left must be let go.
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
