"""Exceptions as OpenAI's error objects, for a response and for an event inside a stream."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from reft_runtime.errors import (
    Changed,
    ContextLengthExceeded,
    Draining,
    EngineDead,
    FileTooLarge,
    InvalidFile,
    InvalidRequest,
    NotFound,
    OutOfMemory,
    Overloaded,
    ReftError,
    StoreFull,
    Unavailable,
    WrongBaseModel,
)
from server.refusals import INSTEAD_OF_ROUTES
from server.streaming import json_answer

logger = logging.getLogger("reft.server")

RESTART_SECONDS = 5
"""Seconds after which a client may try again if this process has ended, or is about to."""

MAX_TEXT = 500
"""Most characters of a message or field name; both may quote what the client sent."""

_CODES: dict[type[ReftError], tuple[int, str | None]] = {
    InvalidRequest: (400, None),
    ContextLengthExceeded: (400, "context_length_exceeded"),
    NotFound: (404, "not_found"),
    FileTooLarge: (413, "file_too_large"),
    InvalidFile: (400, "invalid_file"),
    WrongBaseModel: (409, "wrong_base_model"),
    Changed: (412, "precondition_failed"),
    Draining: (503, "draining"),
    Overloaded: (503, "overloaded"),
    EngineDead: (503, "engine_dead"),
    Unavailable: (503, "unavailable"),
    StoreFull: (507, "store_full"),
}
"""Status and code by exception; one that is not listed is an internal error (500)."""


class ApiError(Exception):
    """An error as the client sees it: an HTTP status and OpenAI's error object.

    `kind` is the object's `type`; by default that of the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _shown(message)
        self.param = None if param is None else _shown(param)
        self.code = code
        self.kind = kind
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        if self.kind is not None:
            kind = self.kind
        elif self.status == 401:
            kind = "authentication_error"
        elif self.status == 403:
            kind = "permission_error"
        elif self.status < 500:
            kind = "invalid_request_error"
        else:
            kind = "server_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> Response:
        """The error as a whole response."""
        return json_answer(self.body(), self.status, self.headers)


def api_error(error: BaseException, request_id: str, *, draining: bool = False) -> ApiError:
    """Make of `error` what the client sees; an internal error is logged here, its details not sent.

    If the server is `draining`, the end of the engine is reported as a shutdown, not as a fault.
    """
    if isinstance(error, EngineDead):
        # The log says once why the engine ended; the reason may tell a client too much.
        error = (
            Draining("The server is shutting down.", retry_after=RESTART_SECONDS)
            if draining
            else EngineDead("The engine has stopped, and the server with it; try again later.")
        )
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ReftError):
        for kind in type(error).__mro__:
            if kind in _CODES:
                status, code = _CODES[kind]
                if isinstance(error, NotFound) and error.param == "model":
                    code = "model_not_found"
                headers = {}
                if status == 503:
                    wait = error.retry_after if isinstance(error, Overloaded) else RESTART_SECONDS
                    headers["retry-after"] = str(max(1, math.ceil(wait)))
                return ApiError(
                    status, error.message, param=error.param, code=code, headers=headers
                )
    if isinstance(error, MemoryError) or "can't start new thread" in str(error):
        return api_error(OutOfMemory("Memory ran out; send the request again."), request_id)
    logger.error("Request %s failed", request_id, exc_info=error)
    return ApiError(
        500,
        f"The server failed to answer this request. Its id is {request_id}.",
        code="internal_error",
    )


async def refuse_query(request: Request) -> None:
    """Dependency of routes that answers 400 to a query parameter that is unknown or repeated."""
    taken = [field.alias for field in request.scope["route"].dependant.query_params]
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in taken:
            instead = f", or give one of {', '.join(taken)}" if taken else ""
            instead = ", or send it in the body" if request.method == "POST" else instead
            raise ApiError(
                400,
                f"{request.url.path} takes no query parameter {name!r}; leave it out{instead}.",
                param=name,
            )
        if given.count(name) > 1:
            raise ApiError(400, f"{name}: is given more than once.", param=name)


def install_error_handlers(app: FastAPI) -> None:
    """Answer the errors that `app`'s routes raise on purpose with OpenAI's error object.

    `RequestMiddleware`, which wraps the routes, answers all other exceptions.
    """

    async def handle(request: Request, error: Exception) -> Response:
        draining = request.app.state.context.health.draining
        return api_error(error, request.state.request_id, draining=draining).response()

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, headers, status = request.url.path, error.headers, error.status_code
        message = str(error.detail)
        if path in INSTEAD_OF_ROUTES:
            # It may look like one of ours, with a word in the place of an id.
            status, headers = 404, None
        if status == 404:
            instead = INSTEAD_OF_ROUTES.get(path, "/openapi.json lists them")
            known = {**request.scope, "path": path.rstrip("/")}
            if path.endswith("/") and _methods(request.app.routes, known):
                instead = "leave out the slash at its end"
            message = f"There is no route {path}; {instead}."
        elif status == 405:
            found = _methods(request.app.routes, request.scope)
            # As GET is answered so is HEAD (`RequestMiddleware`).
            methods = ", ".join(sorted(found | {"HEAD"} if "GET" in found else found))
            message = f"{path} does not accept {request.method}, but {methods}."
            headers = {"allow": methods}
        return ApiError(status, message, headers=headers).response()

    async def handle_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param, message = str(first["loc"][-1]), first["msg"]
        message = f"{param}: {message[:1].lower()}{message[1:]}."
        return ApiError(400, message, param=param).response()

    for kind in (ReftError, ApiError):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(RequestValidationError, handle_invalid)


def _methods(routes: Iterable[BaseRoute], scope: Scope) -> set[str]:
    """Methods that the routes of this path accept together; each route knows only its own."""
    found: set[str] = set()
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            found |= _methods(inner.routes, scope)
        elif route.matches(scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return found


def _shown(text: str) -> str:
    """`text` as valid UTF-8, cut after `MAX_TEXT` characters."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."
