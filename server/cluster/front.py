"""The front of a cluster: takes a request, finds its replica, and passes the answer on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from reft_runtime.errors import Draining, Overloaded, ReftError, Unavailable
from server.auth import tenant_for
from server.cluster.affinity import key_of, names_of
from server.cluster.bodies import Bodies
from server.cluster.calls import Call, Full, Head, NoReplica, Part, ReplicaDied
from server.connections import Limits
from server.context import BODIES_BYTES, BodyBudget
from server.cors import with_cors
from server.disconnect import ClientDisconnected, run_unless_disconnected
from server.errors import RESTART_SECONDS, ApiError, api_error
from server.logs import log_request
from server.middleware import request_id
from server.settings import Settings
from server.streaming import DONE, event, json_bytes, named_event
from server.tenants.keys import Keys

logger = logging.getLogger("reft.server")

ATTEMPTS = 3
"""Replicas that are asked where the ones before have died."""

READY_PATHS = {"/readyz", "/health"}

HEALTH_PATHS = {"/livez", *READY_PATHS}

LOOK_SECONDS = 0.1
"""Pause between two looks at whether requests are under way when a front drains."""

END_SECONDS = 1.0
"""Seconds in which clients take the errors that end their requests."""

HEALTH_SECONDS = 5.0
"""Seconds in which a replica must answer a question about its health."""

ONCE_PATHS = ("/rollback", "/load_lora_adapter", "/unload_lora_adapter")
"""Ends of the paths whose requests must not be sent twice, although they are POST."""

ENDS = (
    DONE,
    b"event: response.completed\n",
    b"event: response.incomplete\n",
    b"event: error\n",
)
"""What only the last piece of a stream has in it: JSON has no line's end."""


class Pool(Protocol):
    """The replicas as a front sees them."""

    async def base(self) -> str:
        """The id of the base model. Raises `NoReplica`."""

    def ask(self, call: Call, key: str) -> AsyncIterator[Head | bytes]:
        """Send a call to the replica of a key, or without one to any, and yield its answer.

        Closing the iterator tells the replica that its client has left. It raises `ReplicaDied`,
        `Full` and `NoReplica`.
        """

    async def keep(self, data: bytes) -> Part:
        """Keep a part of a body for the replica that will read it."""


class Front:
    """An ASGI application that answers every route by a replica.

    A request that its replica's death ended before the answer began is sent to another, unless it
    may have changed something. Answers that have begun end with an error event, or are cut off.
    """

    def __init__(self, pool: Pool, settings: Settings, limits: Limits | None = None) -> None:
        self._pool = pool
        self._keys = Keys.of(settings)
        self._origins = settings.origins
        most = settings.max_body_bytes
        self._budget = BodyBudget(max(BODIES_BYTES, 2 * most))
        self._bodies = Bodies(pool.keep, self._budget, most, limits or Limits(0))
        self._base: str | None = None
        self._draining = False
        self._under_way = 0
        self._limits: set[asyncio.Timeout] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before it has begun: the client gets a 403
            return
        scope.setdefault("state", {})["request_id"] = request_id(Headers(scope=scope))
        self._under_way += 1
        try:
            await self._answer(scope, receive, send)
        except (ClientDisconnect, ClientDisconnected):
            logger.debug("%s %s: the client left", scope["method"], scope["path"])
        finally:
            self._under_way -= 1
            self._budget.give_back(scope)

    async def drain(self, seconds: float) -> None:
        """Refuse new requests from now on, and end those that are under way for so long."""
        self._draining = True
        await self._none_under_way(seconds)
        for limit in self._limits:
            limit.reschedule(0)
        await self._none_under_way(END_SECONDS)

    async def _none_under_way(self, seconds: float) -> None:
        """Wait until no request is under way, or so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._under_way:
                    await asyncio.sleep(LOOK_SECONDS)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Follow the keys file from the application's start to its end."""
        await receive()
        following = asyncio.ensure_future(self._keys.follow(asyncio.to_thread))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        following.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, began = _Sending(send), time.monotonic()
        if self._draining and scope["path"] in READY_PATHS:
            await _unwell(sending, "draining")
            return
        try:
            if self._draining and scope["path"] not in HEALTH_PATHS:
                raise _draining()
            await self._work(scope, receive, sending)
        except (ApiError, ReftError) as error:
            problem = api_error(error, scope["state"]["request_id"])
            if not sending.begun:
                log_request(scope, problem.status, time.monotonic() - began)  # no replica does
                await with_cors(problem.response(), self._origins)(scope, receive, send)
            elif sending.streams:
                await sending.piece(_broken(scope["path"], problem, sending.events))
                await sending.end()
            else:
                raise  # the connection is cut: nothing else says that the answer is not whole

    async def _work(self, scope: Scope, receive: Receive, sending: _Sending) -> None:
        """Answer a request by a replica. Raises `Draining` if its time ends before."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._limits.add(limit)
                call = await self._call(scope, receive)
                await run_unless_disconnected(receive, self._pass_on(scope, call, sending))
        except TimeoutError:
            if limit.expired():
                raise _draining() from None
            raise
        finally:
            self._limits.discard(limit)

    async def _call(self, scope: Scope, receive: Receive) -> Call:
        """The request as a replica gets it. Raises what `Bodies.take` does, and `Unavailable`."""
        headers = Headers(scope=scope)
        parts: list[Part] = []
        value: Any = None
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if has_body and scope["path"] not in HEALTH_PATHS:
            # Of an unknown key nothing is received, and a replica that knows it by now, as the
            # keys file is looked at by each process, would take that for an empty body.
            tenant_for(self._keys, headers.get("authorization", ""))
            parts, value = await self._bodies.take(scope, receive)
        names: tuple[str, ...] = ()
        if scope["path"].startswith("/v1/interventions/") or value is not None:
            names = names_of(scope["path"], value, await self._base_id())
        return Call(
            method=scope["method"],
            path=scope["path"],
            raw_path=scope.get("raw_path") or scope["path"].encode(),
            query=scope["query_string"],
            headers=[(bytes(name), bytes(text)) for name, text in scope["headers"]],
            client=scope.get("client") and tuple(scope["client"]),
            scheme=scope.get("scheme", "http"),
            body=parts,
            names=names,
        )

    async def _base_id(self) -> str:
        if self._base is None:
            try:
                self._base = await self._pool.base()
            except NoReplica:
                raise _no_replica() from None
        return self._base

    async def _pass_on(self, scope: Scope, call: Call, sending: _Sending) -> None:
        if call.path not in HEALTH_PATHS:
            await self._ask(call, sending)
            return
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._ask(call, sending)
        except (TimeoutError, ReftError):
            if sending.begun:
                raise
            await _unwell(sending, "no replica answers")

    async def _ask(self, call: Call, sending: _Sending) -> None:
        """Send the answer of a replica. Raises `Overloaded`, `Unavailable` and `ApiError`."""
        key = key_of(call.names)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(self._pool.ask(call, key)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        if isinstance(piece, Head):
                            await sending.start(piece)
                        else:
                            await sending.piece(piece)
                await sending.end()
                return
            except ReplicaDied:
                if sending.whole:
                    await sending.end()
                    return
                if sending.begun or not _repeatable(call):
                    raise _died(call, sending) from None
                logger.warning("The replica of %s %s died", call.method, call.path)
                if attempt == ATTEMPTS:
                    raise _no_replica() from None
            except Full:
                raise Overloaded(
                    "All replicas are full, and so is the queue; try again later."
                ) from None
            except NoReplica:
                raise _no_replica() from None


class _Sending:
    """An answer on its way to the client: whether it has begun, and whether it is a stream."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.streams = False
        self.whole = False
        """Whether the client has all of it, although the replica may not have said so yet."""
        self.events = 0
        """Events of a stream that were sent."""
        self._left: int | None = None

    async def start(self, head: Head) -> None:
        """Send the head, and what followed it at once."""
        self.begun = True
        headers = {name.lower(): text for name, text in head.headers}
        self.streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        self._left = int(headers[b"content-length"]) if b"content-length" in headers else None
        await self._send(
            {"type": "http.response.start", "status": head.status, "headers": head.headers}
        )
        await self.piece(head.body)

    async def piece(self, body: bytes) -> None:
        """Send a piece of the body."""
        if body:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
        self.events += body.count(b"\n\n") if self.streams else 0
        if self._left is not None:
            self._left -= len(body)
        self.whole = self._left == 0 or (self.streams and any(end in body for end in ENDS))

    async def end(self) -> None:
        """End the answer."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _unwell(sending: _Sending, status: str) -> None:
    """Answer a question about health as a server that is not ready does."""
    headers = [(b"content-type", b"application/json")]
    await sending.start(Head(503, headers, json_bytes({"status": status})))
    await sending.end()


def _repeatable(call: Call) -> bool:
    """Whether a request may be sent again although it may have been carried out."""
    if call.method == "POST":
        return not call.path.endswith(ONCE_PATHS)
    return call.method in ("GET", "HEAD", "OPTIONS")


def _draining() -> ReftError:
    return Draining("The cluster is shutting down.", retry_after=RESTART_SECONDS)


def _no_replica() -> ReftError:
    return Unavailable("No replica can take the request now; try again later.")


def _died(call: Call, sending: _Sending) -> ApiError:
    again = (
        "send the request again."
        if sending.begun or _repeatable(call)
        else "look whether the change was made before you send it again."
    )
    return ApiError(
        503,
        f"The replica that answered this request has ended; {again}",
        code="replica_died",
        headers={"retry-after": "1"},
    )


def _broken(path: str, problem: ApiError, sent: int) -> bytes:
    """What ends a stream that cannot go on after `sent` events, as the route's own errors do."""
    body = problem.body()
    if path != "/v1/responses":
        return event(body) + DONE
    error = body["error"]
    said = {name: error[name] for name in ("code", "message", "param")}
    fields = {"type": "error", "sequence_number": sent, **said, "error": error}
    return named_event("error", fields)
