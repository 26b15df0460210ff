"""HTTP answers of the generating routes, whole or streamed; each ends when its client leaves."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from reft_runtime.outputs import Choice, Trace
from server.context import Context
from server.disconnect import ClientDisconnected, run_unless_disconnected
from server.errors import ApiError, api_error
from server.following import Rest
from server.generation import Job, Run, Step, opened
from server.schemas.common import SamplingBody
from server.streaming import json_bytes

logger = logging.getLogger("reft.server")

AT_ONCE_TOKENS = 4096
"""Most tokens written on the event loop; a larger answer would hold up other requests."""

AT_ONCE_SCORED = 64
"""The same, of tokens with their log-probabilities."""

WRITE_NOW = "reft.write_now"
"""ASGI extension: its `write` writes a piece of a stream that has begun, without `send`.

It returns False if it did not, because the piece has to wait for the client to read."""


class Writer(ABC):
    """How one route writes its answer; an instance serves one request."""

    prefix: str
    """The beginning of the answer's id."""

    @property
    def heavy(self) -> bool:
        """Whether each token takes so long to write that a few would hold up other requests."""
        return False

    def is_large(self, run: Run) -> bool:
        """Whether the answer so far is too large to be written on the event loop."""
        tokens = run.job.prompt_tokens * run.job.n + run.completion_tokens
        return self.heavy or tokens > AT_ONCE_TOKENS

    def is_large_step(self, run: Run, step: Step, *, fresh: bool) -> bool:
        """Whether what one step adds is; in a `fresh` one a choice begins.

        That may bring the choice's prompt with all of its log-probabilities. To a client that read
        nothing for a while a step may bring many tokens.
        """
        most = AT_ONCE_SCORED if self.heavy else AT_ONCE_TOKENS
        large = sum([len(delta.tokens) for _, delta in step]) > most
        return large or (fresh and self.is_large(run))

    @abstractmethod
    def body(self, run: Run, choices: list[Choice], traces: list[Trace]) -> dict[str, Any]:
        """Write a whole answer."""

    @abstractmethod
    def events(self, run: Run, step: Step) -> bytes:
        """Write the events, maybe none, that one step adds to a stream."""

    @abstractmethod
    def end(self, run: Run, traces: list[Trace]) -> bytes:
        """Write what ends a stream."""

    @abstractmethod
    def broken(self, problem: ApiError) -> bytes:
        """Write what ends a stream that has begun and cannot go on."""


class EngineAnswer(Response, ABC):
    """The response of a route that asks the engine.

    All work, from opening the request in the engine on, happens while the response is sent, so
    the engine's part of a request never outlives its connection. A failure before anything is
    sent is raised, and answered with its own status; a later one ends the stream with an error
    event.
    """

    def __init__(
        self, context: Context, prepare: Callable[[], Awaitable[Job]], request_id: str
    ) -> None:
        super().__init__()
        self._context = context
        self._prepare = prepare
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer (ASGI)."""
        try:
            await run_unless_disconnected(receive, self._send_in_time(scope, receive, send))
        except ClientDisconnected:
            logger.debug("Request %s: the client left", self._request_id)

    async def _send_in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        limit = self._context.settings.request_timeout
        try:
            try:
                async with asyncio.timeout(limit):
                    # The log of the request (`server.logs`) reads `job`, and `run` beside it.
                    scope["state"]["job"] = job = await self._prepare()
                    await self._respond(job, scope, receive, watched_send)
            except TimeoutError:
                # Not 503: asked again, it would take as long.
                raise ApiError(
                    504,
                    f"The answer took more than {limit:g} seconds; ask for fewer tokens.",
                    code="timeout",
                ) from None
        except Exception as error:
            if not started:
                raise
            draining = self._context.health.draining
            problem = api_error(error, self._request_id, draining=draining)
            # A client that does not read this loses its connection (`server.protocol`).
            await send(_piece(self._broken(problem)))
            await send(_piece(b"", more=False))

    def _broken(self, problem: ApiError) -> bytes:
        """What ends a stream that cannot go on; nothing where the answer is no stream."""
        return b""

    @abstractmethod
    async def _respond(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        """Open the job in the engine, note the run in the scope's state, and send the answer."""


class Answer(EngineAnswer):
    """The response of a generating route, whole or streamed."""

    def __init__(
        self,
        context: Context,
        body: SamplingBody,
        writer: Writer,
        prepare: Callable[[], Awaitable[Job]],
        request_id: str,
    ) -> None:
        super().__init__(context, prepare, request_id)
        self._request = body
        self._writer = writer

    async def _respond(self, job: Job, scope: Scope, receive: Receive, send: Send) -> None:
        async with opened(self._context, job) as run:
            scope["state"]["run"] = run
            if self._request.stream:
                await self._stream(run, scope, send)
                return
            choices = await run.collect()
            traces = await run.explain()
        # The engine is done with the request; how fast the client reads is no concern of it.
        content = await self._written(
            lambda: json_bytes(self._writer.body(run, choices, traces)),
            apart=bool(traces) or self._writer.is_large(run),
        )
        whole = Response(content, headers=run.headers(), media_type="application/json")
        await whole(scope, receive, send)

    def _broken(self, problem: ApiError) -> bytes:
        return self._writer.broken(problem)

    async def _stream(self, run: Run, scope: Scope, send: Send) -> None:
        write_now = scope.get("extensions", {}).get(WRITE_NOW, {}).get("write", _never)
        writer = self._writer
        begun: set[int] = set()
        started = False

        async def write(events: bytes | Callable[[], bytes]) -> None:
            nonlocal started
            if not isinstance(events, bytes):
                events = await asyncio.to_thread(events)
            if not started:
                await send(self._start(run))
                started = True
            if events:
                await send(_piece(events))

        def take(step: Step) -> Rest:
            fresh = {index for index, _ in step} - begun
            begun.update(fresh)
            if writer.is_large_step(run, step, fresh=bool(fresh)):
                return write(partial(writer.events, run, step))
            events = writer.events(run, step)
            return None if started and (not events or write_now(events)) else write(events)

        await run.follow(take)
        traces = await run.explain()
        end = await self._written(
            lambda: writer.end(run, traces), apart=bool(traces) or writer.is_large(run)
        )
        await send(_piece(end))
        await send(_piece(b"", more=False))

    @staticmethod
    async def _written(write: Callable[[], bytes], *, apart: bool) -> bytes:
        """What `write` returns, which it makes in a thread if it is to be done `apart`."""
        return await asyncio.to_thread(write) if apart else write()

    def _start(self, run: Run) -> dict[str, Any]:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        raw = [(k.encode(), v.encode("latin-1")) for k, v in (headers | run.headers()).items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


def _never(_: bytes) -> bool:
    """Stands for the extension on a server that does not have it."""
    return False


def _piece(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}
