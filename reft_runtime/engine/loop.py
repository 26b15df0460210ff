"""The thread that runs the engine, and how other threads submit requests and get events back."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from reft_runtime.engine.core import EngineCore
from reft_runtime.engine.events import Event, Explained, Failed, LabelsScored, Started, TokenMade
from reft_runtime.engine.queued import QueuedRequests
from reft_runtime.engine.settle import OUT_OF_MEMORY
from reft_runtime.errors import Draining, EngineDead, InvalidRequest
from reft_runtime.machine.contention import StepWatch
from reft_runtime.machine.memory import CODE_ROOM, check_room
from reft_runtime.schedule.request import Request
from reft_runtime.stats import EngineStats

Sink = Callable[[list[Event]], None]
"""Receives a step's events of all requests submitted with it: one call, on the engine's thread."""

OnEnd = Callable[[], None]
"""Called once when a request is over, on whichever thread ended it."""

HEARTBEAT_SECONDS = 1.0

LEAVE_SECONDS = 5.0
"""A step that waits for what is gone is left alone after this time."""

HUNG_SECONDS = 10.0
"""A step that takes so much longer than it may does not end: nobody waits for it at the close."""

_TRACE = -1
"""Stands for the trace among what a request still waits for: choices 0 and up, and its trace."""

THREAD_BYTES = 16 << 20
"""Bytes of address space of one thread: its stack, and what the allocator reserves for it."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    """An accepted request: who gets its events, and what is still to come (choices, a trace)."""

    sink: Sink
    on_end: OnEnd
    left: set[int]
    known_as: str
    """The caller's id, or else the request's."""


class EngineLoop:
    """Runs an `EngineCore` in its own thread; public methods may be called from any thread.

    A request is over when its choices have ended (a traced one: when its trace is told), when it
    was aborted or failed, when nobody takes its events any more, or when the engine stopped.
    `max_queued` and `max_queued_tokens` bound the requests (and their prompt tokens) that were
    submitted and have not started; beyond them `submit` raises `Overloaded` (see `QueuedRequests`).
    With `yield_cores`, fewer threads compute while others want the cores (see `StepWatch`).
    """

    def __init__(
        self,
        core: EngineCore,
        max_queued: int,
        max_queued_tokens: int,
        *,
        yield_cores: bool = False,
    ) -> None:
        self._core = core
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._live: dict[str, _Live] = {}
        self._taken: set[str] = set()
        """What the live requests are `known_as`."""
        self._queued = QueuedRequests(max_queued, max_queued_tokens)
        self._draining = False
        self._closing = False
        self._death: str | None = None
        self._failed = False
        self._beat = time.monotonic()
        self._threads = torch.get_num_threads()
        on_cpu = core.loaded.device.type == "cpu"
        use = torch.set_num_threads if yield_cores else None
        self.watch = StepWatch(self._threads if on_cpu else 1, use)
        self._thread = threading.Thread(target=self._run, name="reft-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and the engine has not broken."""
        return self._death is None and self._thread.is_alive()

    def submit(self, request: Request, sink: Sink, on_end: OnEnd = lambda: None) -> None:
        """Queue a request; its events go to `sink` until it is over, and then `on_end` is called.

        Raises `InvalidRequest` if a request with the same id of its caller is not over,
        `Overloaded`, `Draining` or `EngineDead`; then nothing is queued, and `on_end` is never
        called.
        """
        known_as = request.given_id or request.id
        with self._changed:
            if self._death is not None or self._closing:
                raise EngineDead(self._death or "the engine is closed")
            if known_as in self._taken:
                raise InvalidRequest(
                    f"request_id: a request of the id {known_as!r} is under way; give another.",
                    param="request_id",
                )
            if self._draining:
                raise Draining("The server is shutting down; try another one.", retry_after=5)
            self._queued.add(request)
            left = {*range(request.sampling.n), *([_TRACE] if request.trace else [])}
            self._live[request.id] = _Live(sink, on_end, left, known_as)
            self._taken.add(known_as)
            self._inbox.append(lambda: self._add(request))
            self._changed.notify_all()

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """End a request, or one of its choices, without an event; one that has ended is ignored."""
        ended: list[OnEnd] = []
        with self._changed:
            if request_id not in self._live:
                return
            if choice is None:
                ended += self._forget(request_id)
            else:
                ended += self._has_come(request_id, choice)
            self._inbox.append(lambda: self._deliver(self._core.abort(request_id, choice)))
            self._changed.notify_all()
        _call(ended)

    def begin_drain(self) -> None:
        """Refuse new requests from now on; requests that were accepted go on."""
        with self._changed:
            self._draining = True

    def wait_empty(self) -> None:
        """Block until no request is left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._live)

    def stats(self) -> EngineStats:
        """Return a snapshot, taken without stopping the engine."""
        core, scheduler = self._core, self._core.scheduler
        with self._changed:
            waiting_by_tenant = self._queued.by_tenant()
        budget = scheduler.budget
        return EngineStats(
            running=len(scheduler.running),
            waiting=sum(waiting_by_tenant.values()),
            kv_usage=budget.used / budget.total,
            steps=core.steps,
            prompt_tokens=core.requests.prompt_tokens,
            generation_tokens=core.requests.generation_tokens,
            preemptions=scheduler.preemptions,
            heartbeat_age=max(0.0, time.monotonic() - self._beat - core.allowance),
            prefix_cache=budget.reuse_stats(),
            waiting_by_tenant=waiting_by_tenant,
        )

    def close(self) -> None:
        """Fail the requests that are left, stop the thread and wait for it.

        After `fail`, and where a step hangs, it waits some seconds: a thread that does not end
        keeps its memory.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        while (thread := self._thread) is not threading.current_thread() and thread.is_alive():
            # It may have handed over to another thread.
            thread.join(LEAVE_SECONDS)
            if self._failed and thread.is_alive():
                return
            if thread.is_alive() and self.stats().heartbeat_age > HUNG_SECONDS:
                logger.error("A step does not end; the engine is closed without it")
                self.fail("a step does not end")
        self._core.close()

    def fail(self, reason: str) -> None:
        """Fail every request and take no more, although the thread may never end its step."""
        with self._changed:
            self._failed = self._closing = True
            self._changed.notify_all()
        self._die(reason)

    def check_integrity(self) -> None:
        """Raise AssertionError if anything is left of requests that have ended.

        It is raised for an engine that has stopped, too, because that cannot be checked any more.
        """
        done = threading.Event()
        problems: list[AssertionError] = []

        def check() -> None:
            try:
                self._core.check_integrity()
            except AssertionError as error:
                problems.append(error)
            done.set()

        with self._changed:
            self._inbox.append(check)
            self._changed.notify_all()
        while not done.wait(HEARTBEAT_SECONDS):
            if not self.alive:
                raise AssertionError("the engine has stopped")
        if problems:
            raise problems[0]

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps this number per thread
        if self._core.loaded.device.type == "cuda":
            torch.cuda.set_device(self._core.loaded.device)  # CUDA keeps its device per thread
        try:
            while self._turn():
                if self._core.spoiled and self._hand_over():
                    return
        except EngineDead as error:  # whoever raised it has logged it
            self._die(error.message)
        except Exception:
            logger.exception("The engine stopped")
            self._die("the engine stopped on an internal error")
        else:
            self._die("the engine was closed")

    def _hand_over(self) -> bool:
        """Start a thread in this one's place; False if memory is too short for it and its pool."""
        successor = threading.Thread(target=self._run, name="reft-engine", daemon=True)
        try:
            check_room(CODE_ROOM + torch.get_num_threads() * THREAD_BYTES)
            self._core.spoiled = False
            successor.start()
        except (MemoryError, RuntimeError):
            self._core.spoiled = True
            return False
        self._thread = successor
        return True

    def _turn(self) -> bool:
        with self._changed:
            if self._core.idle and not self._inbox and not self._closing:
                self._changed.wait(HEARTBEAT_SECONDS)
            self._beat = time.monotonic()
            if self._closing:
                return False
            messages = list(self._inbox)
            self._inbox.clear()
        for message in messages:
            message()
        if not self._core.idle:
            with self.watch.step():
                events = self._core.step()
            self._deliver(events)
        return True

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except MemoryError:
            self._core.abort(request.id)
            self._deliver([Failed(request.id, OUT_OF_MEMORY, out_of_memory=True)])

    def _deliver(self, events: list[Event]) -> None:
        """Hand each caller its events of the step in one call."""
        by_sink: dict[Sink, list[Event]] = {}
        ended: list[OnEnd] = []
        with self._changed:
            for event in events:
                live = self._live.get(event.request_id)
                if live is None:
                    continue  # aborted while the step ran
                by_sink.setdefault(live.sink, []).append(event)
                match event:
                    case Started():
                        self._queued.discard(event.request_id)
                    case Failed():
                        ended += self._forget(event.request_id)
                    case TokenMade() if event.finish_reason:
                        ended += self._has_come(event.request_id, event.choice)
                    case LabelsScored():
                        ended += self._has_come(event.request_id, 0)
                    case Explained():
                        ended += self._has_come(event.request_id, _TRACE)
        for sink, batch in by_sink.items():
            try:
                sink(batch)
            except Exception:
                # Its caller has gone (a closed event loop, say): nobody will read the rest.
                logger.exception("Events could not be delivered")
                for event in batch:
                    self.abort(event.request_id)
        _call(ended)

    def _has_come(self, request_id: str, what: int) -> list[OnEnd]:
        """Cross off a choice, or the trace; with the last one the request is over.

        Returns the callbacks to call without the lock.
        """
        left = self._live[request_id].left
        left.discard(what)
        return [] if left else self._forget(request_id)

    def _forget(self, request_id: str) -> list[OnEnd]:
        """Remove a request while the lock is held; the returned callbacks are called without it."""
        self._queued.discard(request_id)
        live = self._live.pop(request_id)
        self._taken.discard(live.known_as)
        if not self._live:
            self._changed.notify_all()
        return [live.on_end]

    def _die(self, reason: str) -> None:
        """Fail every request, so that nobody waits for an engine that has stopped."""
        by_sink: dict[Sink, list[Event]] = {}
        ended: list[OnEnd] = []
        with self._changed:
            self._death = self._death or reason
            for request_id, live in list(self._live.items()):
                by_sink.setdefault(live.sink, []).append(Failed(request_id, self._death))
                ended += self._forget(request_id)
        for sink, batch in by_sink.items():
            with contextlib.suppress(Exception):
                sink(batch)
        _call(ended)


def _call(ended: list[OnEnd]) -> None:
    for on_end in ended:
        try:
            on_end()
        except Exception:  # it is that caller's fault and must not harm others
            logger.exception("The end of a request could not be told")
