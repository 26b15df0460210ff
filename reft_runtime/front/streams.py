"""A request's answer as an asyncio stream.

The engine's thread wakes an event loop once a step, with the events of all its requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Self

from reft_runtime.engine.events import Event
from reft_runtime.errors import EngineDead, OutOfMemory, ReftError, RequestFailed
from reft_runtime.front.assembly import Assembler
from reft_runtime.outputs import ChoiceDelta, TokenLogprob, Trace


class Stream:
    """One request as an asynchronous iterator over what its choices gain.

    Each item holds what came since the last one, so a slow reader gets larger items. Iteration ends
    after all choices have ended, and raises `RequestFailed`, `OutOfMemory`, `EngineDead`, or (for a
    grammar that proves too complex) `InvalidRequest` if the request did not get that far; if only
    its trace fails, `trace` raises instead. `versions` are
    the interventions applied, as `name@digest`, in order.

    Who wants no task to wake for every token gives a `listener`, and takes what `gained` returns.
    """

    def __init__(
        self,
        assembler: Assembler,
        versions: list[str],
        on_end: Callable[[], None],
        abort: Callable[[], None],
        engine_alive: Callable[[], bool],
    ) -> None:
        self.assembler = assembler
        self.versions = versions
        self.queue_seconds: float | None = None
        self._on_end = on_end
        self._abort = abort
        self._engine_alive = engine_alive
        self._submitted = time.monotonic()
        self._deltas: list[ChoiceDelta] = []
        self._error: ReftError | None = None
        self._answered = False
        self._over = False
        self._ready = asyncio.Event()
        self.listener: Callable[[], None] = self._ready.set
        """Called on the event loop when a step told of the request, and when it was aborted."""

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        """The prompt's log-probabilities, if asked for; complete when the first item arrives."""
        return self.assembler.prompt_logprobs

    @property
    def label_logprobs(self) -> tuple[float, ...]:
        """Log-probabilities of the request's labels, once it has ended; empty without labels."""
        return self.assembler.label_logprobs

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache; known when the first item arrives."""
        return self.assembler.cached_tokens

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[ChoiceDelta]:
        while not (deltas := self.gained()):
            if deltas is None:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return deltas

    def gained(self) -> list[ChoiceDelta] | None:
        """What the choices gained since the last call, maybe nothing.

        None once all choices have ended and everything was returned; raises as iteration does.
        """
        if deltas := self._deltas:
            self._deltas = []
            return deltas
        if self._error is not None and not self._answered:
            raise self._error
        return None if self._over or self._answered else deltas

    async def trace(self) -> Trace:
        """What the interventions of a traced request did; waits until all its choices have ended.

        Raises `RequestFailed`, `OutOfMemory` or `EngineDead`, as iteration does. Cancelling this
        call ends the request.
        """
        try:
            while not self._over:
                self._ready.clear()
                await self._ready.wait()
        except asyncio.CancelledError:
            self.abort()
            raise
        if self._error is not None:
            raise self._error
        return await asyncio.to_thread(self.assembler.trace)

    def abort(self) -> None:
        """End the request and free what it holds; does nothing if it is over."""
        if not self._over:
            self._abort()
            self._end()
            self.listener()

    def feed(self, event: Event) -> None:
        """Take one event of this request, on the event loop; `listener` is called after the last.

        A step may have several events of a request.
        """
        if self._over:
            return
        try:
            delta = self.assembler.feed(event)
        except ReftError as error:
            self._error = error if self._engine_alive() else EngineDead(error.message)
            self._end()
            return
        except Exception as error:
            # A fault while the text is made ends this request alone.
            memory = isinstance(error, MemoryError)
            kind = OutOfMemory if memory else RequestFailed
            self._error = kind(f"its text could not be made: {error}")
            self._abort()
            self._end()
            return
        if self.assembler.started_at is not None:
            self.queue_seconds = self.assembler.started_at - self._submitted
        if delta is not None:
            self._deltas.append(delta)
        self._answered = self.assembler.done
        if self.assembler.over:
            self._end()

    def _end(self) -> None:
        self._over = True
        self._on_end()


class EventLoopSink:
    """Delivers a step's events to the streams of one event loop, in one wake-up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.streams: dict[str, Stream] = {}

    def __call__(self, events: list[Event]) -> None:
        """Hand over the events of one step; called on the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[Event]) -> None:
        fed: dict[Stream, None] = {}
        for event in events:
            stream = self.streams.get(event.request_id)
            if stream is not None:
                stream.feed(event)
                fed[stream] = None
        for stream in fed:
            stream.listener()
