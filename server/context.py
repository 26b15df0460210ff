"""What every route needs: the engine, the settings, the metrics, the server's health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from server.health import Health
from server.metrics import Metrics
from server.settings import Settings
from server.uploads import UploadBudget

if TYPE_CHECKING:
    from reft_runtime.llm import Engine


P = ParamSpec("P")
R = TypeVar("R")

ADMIN_THREADS = 4
"""Threads for uploads, listings and metrics; those of requests are asyncio's own."""


@dataclass(frozen=True, slots=True)
class Context:
    """One server's parts; `started` is Unix time in seconds."""

    engine: Engine
    settings: Settings
    metrics: Metrics
    health: Health
    started: int = field(default_factory=lambda: int(time.time()))
    uploads: UploadBudget = field(default_factory=UploadBudget)
    _admin: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(ADMIN_THREADS, "reft-admin")
    )

    async def administer(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run what may take long in a thread that no completion waits for."""
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._admin, work)

    def close(self) -> None:
        """Start no more of it."""
        self._admin.shutdown(wait=False, cancel_futures=True)


async def _context(request: Request) -> Context:  # async, for others go through a thread
    context: Context = request.app.state.context
    return context


Server = Annotated[Context, Depends(_context)]
"""A route's parameter of this type gets the context of the app it belongs to."""
