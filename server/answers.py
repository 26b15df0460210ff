"""HTTP answers of the generating routes, whole or streamed; each ends when its client leaves."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from reft_runtime.errors import Overloaded
from reft_runtime.outputs import Choice, ChoiceDelta, Trace
from server.context import Context
from server.disconnect import ClientDisconnected, run_unless_disconnected
from server.errors import api_error
from server.generation import Job, Run, opened
from server.schemas.common import SamplingBody
from server.streaming import DONE, event, json_bytes

logger = logging.getLogger("reft.server")

AT_ONCE_TOKENS = 4096
"""Most tokens written on the event loop; a larger answer would hold up other requests."""


class Writer(ABC):
    """How one route writes choices; an instance serves one request."""

    prefix: str
    """The beginning of the answer's id."""

    object: str
    chunk_object: str

    @property
    def heavy(self) -> bool:
        """Whether each token takes so long to write that a few would hold up other requests."""
        return False

    def whole(self, run: Run) -> dict[str, Any]:
        """Fields beside the choices, in a whole answer and in a stream's first event."""
        return {}

    @abstractmethod
    def choice(self, run: Run, choice: Choice) -> dict[str, Any]:
        """Write a finished choice for a whole answer."""

    @abstractmethod
    def chunks(self, run: Run, index: int, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """Write the chunks, none to two, that one delta adds to a stream."""


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
                raise Overloaded(f"The answer took more than {limit:g} seconds.") from None
        except Exception as error:
            if not started:
                raise
            draining = self._context.health.draining
            problem = api_error(error, self._request_id, draining=draining)
            # A client that does not read this loses its connection (`server.protocol`).
            await send(_piece(event(problem.body()) + DONE))
            await send(_piece(b"", more=False))

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
        with opened(self._context, job) as run:
            scope["state"]["run"] = run
            if self._request.stream:
                await self._stream(run, send)
                return
            choices = await run.collect()
            traces = await run.explain()
        # The engine is done with the request; how fast the client reads is no concern of it.
        write = partial(self._whole, run, choices, traces)
        large = traces or self._is_large(run)
        content = await asyncio.to_thread(write) if large else write()
        whole = Response(content, headers=run.headers(), media_type="application/json")
        await whole(scope, receive, send)

    def _whole(self, run: Run, choices: list[Choice], traces: list[Trace]) -> bytes:
        written = [self._writer.choice(run, choice) for choice in choices]
        body = self._envelope(run, self._writer.object, written) | {"usage": run.usage()}
        body |= self._writer.whole(run)
        if traces:
            body["trace"] = traces
        return json_bytes(body)

    async def _stream(self, run: Run, send: Send) -> None:
        options = self._request.stream_options
        common = self._envelope(run, self._writer.chunk_object, [])
        if options.include_usage:
            common["usage"] = None

        def written(step: list[tuple[int, ChoiceDelta]], first: bool) -> bytes:
            if options.continuous_usage_stats:
                common["usage"] = run.usage()
            chunks = [c for index, delta in step for c in self._writer.chunks(run, index, delta)]
            events = [common | {"choices": [chunk]} for chunk in chunks]
            if first and events:
                events[0] |= self._writer.whole(run)
            return b"".join(map(event, events))

        started = False
        begun: set[int] = set()
        async with aclosing(run.steps()) as steps:
            async for step in steps:
                # A choice's first step may bring its prompt with all of its log-probabilities.
                fresh = {index for index, _ in step} - begun
                begun |= fresh
                if fresh and self._is_large(run):
                    events = await asyncio.to_thread(written, step, not started)
                else:
                    events = written(step, not started)
                if not started:
                    await send(self._start(run))
                    started = True
                if events:
                    await send(_piece(events))
        last: dict[str, Any] = {"usage": run.usage()} if options.include_usage else {}
        end = b""
        if run.job.trace:
            last["trace"] = await run.explain()
            end = await asyncio.to_thread(event, common | last)
        elif last:
            end = event(common | last)
        await send(_piece(end + DONE))
        await send(_piece(b"", more=False))

    def _is_large(self, run: Run) -> bool:
        """Whether the answer is too large to be written on the event loop."""
        prompts = run.job.prompt_tokens * run.job.n
        return self._writer.heavy or prompts + run.completion_tokens > AT_ONCE_TOKENS

    def _envelope(self, run: Run, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": run.job.id,
            "object": kind,
            "created": run.created,
            "model": run.job.label,
            "choices": choices,
        }

    def _start(self, run: Run) -> dict[str, Any]:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        raw = [(k.encode(), v.encode("latin-1")) for k, v in (headers | run.headers()).items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


def _piece(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}
