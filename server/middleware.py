"""What frames every request: its id, and a bound on its headers."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError

MAX_HEADER_BYTES = 32 * 2**10
"""Names and values of all headers of one request."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestMiddleware:
    """Sets `request.state.request_id` and the response header `x-request-id`; bounds the headers.

    Plain ASGI: a `BaseHTTPMiddleware` would hide the client's disconnect from the routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            error = ApiError(431, f"The headers are larger than {MAX_HEADER_BYTES} bytes.")
            await error.response()(scope, receive, send_with_id)
            return
        await self.app(scope, receive, send_with_id)
