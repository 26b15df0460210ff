"""Exceptions as OpenAI's error objects, for a response and for an event inside a stream."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from reft_runtime.errors import (
    Draining,
    FileTooLarge,
    InvalidFile,
    InvalidRequest,
    NotFound,
    Overloaded,
    ReftError,
    StoreFull,
    Unavailable,
    WrongBaseModel,
)
from server.streaming import json_bytes

logger = logging.getLogger("reft.server")

MAX_TEXT = 500
"""Characters of a message or field name; both may quote what the client sent."""

_CODES: dict[type[ReftError], tuple[int, str | None]] = {
    InvalidRequest: (400, None),
    NotFound: (404, "not_found"),
    FileTooLarge: (413, "file_too_large"),
    InvalidFile: (400, "invalid_file"),
    WrongBaseModel: (409, "wrong_base_model"),
    Draining: (503, "draining"),
    Overloaded: (503, "overloaded"),
    Unavailable: (503, "unavailable"),
    StoreFull: (507, "store_full"),
}
"""Status and code by exception; what is not listed is an internal error (500)."""


class ApiError(Exception):
    """An error as the client sees it: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _shown(message)
        self.param = None if param is None else _shown(param)
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        if self.status == 401:
            kind = "authentication_error"
        elif self.status < 500:
            kind = "invalid_request_error"
        else:
            kind = "server_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> Response:
        """The error as a whole response."""
        return Response(
            json_bytes(self.body()), self.status, self.headers, media_type="application/json"
        )


def api_error(error: BaseException, request_id: str) -> ApiError:
    """`error` as the client sees it; an internal one is logged here, and told without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ReftError):
        for kind in type(error).__mro__:
            if kind in _CODES:
                status, code = _CODES[kind]
                if isinstance(error, NotFound) and error.param == "model":
                    code = "model_not_found"
                headers = {}
                if isinstance(error, Overloaded):
                    headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
                return ApiError(
                    status, error.message, param=error.param, code=code, headers=headers
                )
    logger.error("Request %s failed", request_id, exc_info=error)
    return ApiError(
        500,
        f"The server failed to answer this request. Its id is {request_id}.",
        code="internal_error",
    )


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of `app`'s routes with OpenAI's error object."""

    async def handle(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        response = api_error(error, request_id).response()
        # Starlette sends the answer to an unforeseen exception outside all middleware.
        response.headers["x-request-id"] = request_id
        return response

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"There is no route {request.url.path}; /openapi.json lists them.",
            405: f"{request.url.path} does not accept {request.method}.",
        }.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, message, headers=error.headers).response()

    async def handle_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return ApiError(400, first["msg"], param=str(first["loc"][-1])).response()

    for kind in (ReftError, ApiError, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(RequestValidationError, handle_invalid)


def _shown(text: str) -> str:
    """`text` as it may go out: valid UTF-8 and of a sane length."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."
