"""How answers are written to the wire: JSON, and server-sent events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi.responses import Response

DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""


def json_bytes(value: Any) -> bytes:
    """`value` as JSON in UTF-8."""
    return orjson.dumps(value)


def json_answer(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`value` as a whole answer."""
    return Response(json_bytes(value), status, headers, media_type="application/json")


def event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """`value` as one server-sent event with a name."""
    return b"event: " + name.encode() + b"\n" + event(value)
