"""Replicas of a cluster that only catch up; a server's test has no others to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from server.tenants.usage import Found, Query


class OnlyBehind:
    """Replicas of which those of `behind` take no change in."""

    folder = None

    def __init__(self, *behind: str) -> None:
        self.behind = behind

    async def catch_up(self, name: str) -> Sequence[str]:
        return self.behind

    async def metrics(self) -> bytes:
        raise NotImplementedError

    async def stats(self) -> Mapping[str, Any]:
        raise NotImplementedError

    async def usage(self, query: Query) -> Found:
        raise NotImplementedError
