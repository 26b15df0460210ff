"""What every route needs: the engine, the settings, the metrics, the server's health."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from server.health import Health
from server.metrics import Metrics
from server.settings import Settings

if TYPE_CHECKING:
    from reft_runtime.llm import Engine


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts; `started` is Unix time in seconds."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    health: Health
    started: int = field(default_factory=lambda: int(time.time()))


async def _context(request: Request) -> Context:  # async, for others go through a thread
    context: Context = request.app.state.context
    return context


Server = Annotated[Context, Depends(_context)]
"""A route's parameter of this type gets the context of the app it belongs to."""
