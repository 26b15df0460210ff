"""What every route needs: the engine, the settings, the metrics, the server's health."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from starlette.types import Scope

from server.health import Health
from server.metrics import Metrics
from server.settings import Settings

if TYPE_CHECKING:
    from reft_runtime.llm import Engine


BODIES_BYTES = 256 * 2**20
"""Bytes of the bodies of all requests under way, or twice the largest body where that is more."""


class BodyBudget:
    """How much of requests' bodies is held; those under way share one bound."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, scope: Scope, size: int) -> bool:
        """Hold `size` more bytes for a request, if there is room."""
        if self.held + size > self.limit:
            return False
        self.held += size
        scope["state"]["body_bytes"] = scope["state"].get("body_bytes", 0) + size
        return True

    def give_back(self, scope: Scope) -> None:
        """A request has ended."""
        self.held -= scope["state"].pop("body_bytes", 0)


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts; `started` is Unix time in seconds."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    health: Health
    started: int = field(default_factory=lambda: int(time.time()))
    bodies: BodyBudget = field(init=False)

    def __post_init__(self) -> None:
        limit = max(BODIES_BYTES, 2 * self.settings.max_body_bytes)
        object.__setattr__(self, "bodies", BodyBudget(limit))


async def _context(request: Request) -> Context:  # async, for others go through a thread
    context: Context = request.app.state.context
    return context


Server = Annotated[Context, Depends(_context)]
"""A route's parameter of this type gets the context of the app it belongs to."""
