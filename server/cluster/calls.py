"""What a front hands to a replica, and what it gets back: all that travels between them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Part = bytes | Awaitable[bytes]
"""A part of a body: its bytes, or what gives them when it is awaited."""


class Head(NamedTuple):
    """The first thing that a replica answers: the status, the headers, and what followed at once.

    All that comes after it is bytes of the body.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request.

    `path` is decoded, `raw_path` and `query` are as they were sent. `names` are those of the
    interventions that it is about.
    """

    method: str
    path: str
    raw_path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    scheme: str
    body: Sequence[Part] = ()
    names: tuple[str, ...] = ()


class ReplicaDied(Exception):
    """The replica that had the request has ended."""


class Full(Exception):
    """All replicas that may take the request are full, and so is the queue before them."""


class NoReplica(Exception):
    """There is no replica now that could take the request."""
