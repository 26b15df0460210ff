"""A request's answer as an asyncio stream.

The engine's thread wakes an event loop once a step, or once in some steps, with the events of all
its requests.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from reft_runtime.engine.events import Event
from reft_runtime.errors import EngineDead, OutOfMemory, ReftError, RequestFailed
from reft_runtime.front.assembly import Assembler
from reft_runtime.outputs import ChoiceDelta, TokenLogprob, Trace

REST = 3
"""How long a loop delivers nothing, as a multiple of the time that its last delivery took."""

SHORTEST_REST, LONGEST_REST = 0.001, 0.05
"""The shortest rest, in seconds, and the longest: a loop's timers may know milliseconds only."""

FEED_SECONDS = 0.005
"""After this time a delivery ends, and goes on after what else the loop has to do."""

JOINED = 32
"""Most steps of a choice whose tokens are one delta: clients do not take events of any size."""


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
        """What the choices gained since the last call, mostly a delta for each that did.

        None once all choices have ended and everything was returned; raises as iteration does.
        """
        if deltas := self._deltas:
            self._deltas = []
            return deltas if len(deltas) == 1 else _joined(deltas)
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
    """Delivers the events of steps to the streams of one event loop.

    Delivering takes Python's lock, which the engine's thread needs for its next step. So after a
    delivery the loop rests, `REST` times as long as that took: with hundreds of streams, those of a
    fast device get the tokens of a few steps at once, and the engine is not held up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.streams: dict[str, Stream] = {}
        self._gathered: deque[list[Event]] = deque()
        self._called = False
        self._rests_until = 0.0

    def __call__(self, events: list[Event]) -> None:
        """Hand over the events of one step; called on the engine's thread."""
        self._gathered.append(events)
        if not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed
                self._called = False
                raise

    def _deliver(self) -> None:
        left = self._rests_until - self._loop.time()
        if left >= SHORTEST_REST:
            self._loop.call_later(left, self._deliver)
            return
        self._called = False  # before the events are taken: those that come now are not forgotten
        began = time.thread_time()
        self._dispatch()
        if self._gathered:  # the loop has other work, too
            self._called = True
            self._loop.call_soon(self._deliver)
            return
        rest = min(REST * (time.thread_time() - began), LONGEST_REST)
        self._rests_until = self._loop.time() + rest

    def _dispatch(self) -> None:
        """Feed the events of some steps, and tell who listens."""
        fed: dict[Stream, None] = {}
        until = time.monotonic() + FEED_SECONDS
        while self._gathered and time.monotonic() < until:
            for event in self._gathered.popleft():
                stream = self.streams.get(event.request_id)
                if stream is not None:
                    stream.feed(event)
                    fed[stream] = None
        for stream in fed:
            stream.listener()


def _joined(deltas: list[ChoiceDelta]) -> list[ChoiceDelta]:
    """Fewer deltas: of each choice those of up to `JOINED` steps are one."""
    parts: dict[int, list[list[ChoiceDelta]]] = {}
    for delta in deltas:
        own = parts.setdefault(delta.index, [[]])
        if len(own[-1]) == JOINED:
            own.append([])
        own[-1].append(delta)
    if len(parts) == len(deltas):
        return deltas
    return [_one(part) for own in parts.values() for part in own]


def _one(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    """One delta of those of a choice."""
    return ChoiceDelta(
        deltas[0].index,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
        deltas[-1].finish_reason,
        deltas[-1].stop_reason,
    )
