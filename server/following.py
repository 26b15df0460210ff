"""Follows the streams of a request: what a step adds is taken at once, on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_runtime.outputs import ChoiceDelta
    from server.engine import Stream

Rest = Coroutine[None, None, None] | None
"""What is left to do of a step that could not be taken at once; None if nothing is."""


class Follower:
    """Passes what several streams gain to `take`, with the position of the stream.

    `take` is called while a step's events are delivered: to wake a task for every token takes
    longer than to write most tokens. If it returns a coroutine, that is awaited before the next
    call, and what comes meanwhile is taken together.
    """

    def __init__(
        self, streams: Sequence[Stream], take: Callable[[int, list[ChoiceDelta]], Rest]
    ) -> None:
        self._streams = streams
        self._take = take
        self._open = set(range(len(streams)))
        self._rest: Rest = None
        self._asleep: asyncio.Future[None] | None = None
        """Waits for a rest, the end or an error; None while the task itself looks at streams."""

    async def run(self) -> None:
        """Follow the streams until all have ended; raises what they, or `take`, raise."""
        kept = [stream.listener for stream in self._streams]
        try:
            for position, stream in enumerate(self._streams):
                stream.listener = partial(self._heard, position)
            while self._open:
                # While a rest is awaited, streams that were looked at before may gain more.
                awaited = False
                for position in sorted(self._open):
                    self._rest = self._step(position)
                    awaited |= await self._finish()
                if self._open and not awaited:
                    self._asleep = asyncio.get_running_loop().create_future()
                    await self._asleep
                    self._asleep = None
                    await self._finish()
        finally:
            self._asleep = None
            for stream, listener in zip(self._streams, kept, strict=True):
                stream.listener = listener
            if self._rest is not None:
                self._rest.close()

    async def _finish(self) -> bool:
        """Await what is left of a step; False if nothing was."""
        rest, self._rest = self._rest, None
        if rest is None:
            return False
        await rest
        return True

    def _step(self, position: int) -> Rest:
        """Take what a stream has gained."""
        while deltas := self._streams[position].gained():
            if (rest := self._take(position, deltas)) is not None:
                return rest
        if deltas is None:
            self._open.discard(position)
        return None

    def _heard(self, position: int) -> None:
        """A stream has something to tell: take it now if nothing is in the way."""
        asleep = self._asleep
        if asleep is None or asleep.done():
            return  # the task is awake, or cancelled
        try:
            self._rest = self._step(position)
        except Exception as error:
            asleep.set_exception(error)
            return
        if self._rest is not None or not self._open:
            asleep.set_result(None)
