"""Server-sent events: how a chunk of an answer is written to the wire."""

from __future__ import annotations

from typing import Any

import orjson

DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""


def json_bytes(value: Any) -> bytes:
    """`value` as JSON in UTF-8."""
    return orjson.dumps(value)


def event(value: Any) -> bytes:
    """`value` as one server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_event(name: str, value: Any) -> bytes:
    """`value` as one server-sent event with a name."""
    return b"event: " + name.encode() + b"\n" + event(value)
