"""Middleware of every request: its id, a bound on its headers, and an answer in any case."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.context import Context
from server.errors import ApiError, api_error
from server.logs import log_request

MAX_HEADER_BYTES = 32 * 2**10
"""Most bytes of the names and values of all headers of one request."""

REFUSED = "refused"
"""Key of a request's state: the status with which its connection answered it, before the app."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_id(headers: Headers) -> str:
    """The id of a request: that of its client, if it may stand in a log, or one of our own."""
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex


class RequestMiddleware:
    """Gives every request an id, bounds its headers, and logs it when it has ended.

    The id is `request.state.request_id` and the response header `x-request-id`. Headers of more
    than `MAX_HEADER_BYTES` are answered 431. An unforeseen exception is logged and answered here.
    A client that leaves while its body is read ends its request silently: nobody waits for an
    answer. HEAD is answered as GET is, without the body.

    This is plain ASGI: a `BaseHTTPMiddleware` would hide the client's disconnect from the routes.
    """

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self.app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own_id = request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = own_id
        status: int | None = None
        began = time.monotonic()
        asks_head = scope["method"] == "HEAD"
        asked: Scope = {**scope, "method": "GET"} if asks_head else scope

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = own_id
            elif asks_head:
                message = {**message, "body": b""}
            await send(message)

        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            error = ApiError(431, f"The headers are larger than {MAX_HEADER_BYTES} bytes.")
            await error.response()(scope, receive, send_with_id)
            self._ended(scope, status, time.monotonic() - began)
            return
        try:
            await self.app(asked, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception as problem:
            if status is not None:
                raise
            error = api_error(problem, own_id, draining=self._context.health.draining)
            await error.response()(scope, receive, send_with_id)
        finally:
            if asks_head and "route" in asked:
                scope["route"] = asked["route"]  # for its span
            self._context.bodies.give_back(scope)
            status = status or scope["state"].get(REFUSED)
            self._ended(scope, status, time.monotonic() - began)

    def _ended(self, scope: Scope, status: int | None, seconds: float) -> None:
        if self._context.tracing is not None:
            trace = self._context.tracing.ended(scope, status, seconds)
            if trace is not None:
                scope["state"]["trace_id"] = trace
        log_request(scope, status, seconds)
