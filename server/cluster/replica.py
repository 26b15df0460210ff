"""A replica: an engine, and the application of a single server on it, called in this process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import FastAPI

from server.app import create_app
from server.banner import banner
from server.cluster.calls import Call, Head
from server.cluster.in_process import answer
from server.cluster.peers import Answer, Broadcast, Peers, Self
from server.cluster.slots import Slot, state_folder
from server.context import Context
from server.engine import WholeEngine
from server.settings import Settings

logger = logging.getLogger("reft.server")

JOIN_SECONDS = 15.0
"""Seconds after its start in which others may not know a replica yet when they tell of a change."""


class Replica:
    """One replica of a cluster. `name` tells it from the others, `broadcast` asks all of them."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        broadcast: Broadcast,
        start: Callable[[Settings], WholeEngine],
    ) -> None:
        self._settings = settings
        self._name = name
        self._broadcast = broadcast
        self._start = start
        self._stack = AsyncExitStack()
        self._joined = 0.0
        self._app: FastAPI
        self._self: Self

    async def open(self) -> None:
        """Load the model and begin to serve. Raises what the engine and the application raise."""
        state = state_folder(self._settings)
        peers, slot = None, ""
        if state is not None:  # without one it is the only replica
            taken = await asyncio.to_thread(Slot.take, state)
            self._stack.callback(taken.release)
            peers, slot = Peers(self._broadcast, state, taken), taken.name
        engine = await asyncio.to_thread(self._start, self._settings)
        self._stack.push_async_callback(asyncio.to_thread, engine.close)
        self._app = create_app(engine, self._settings, peers)
        await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))
        self._self = Self(self._context, self._name, slot)
        self._joined = time.monotonic()

    async def close(self, seconds: float | None = None) -> None:
        """Give the requests that are left `seconds`, by default `drain_seconds`, and stop."""
        seconds = self._settings.drain_seconds if seconds is None else seconds
        if self._joined:
            engine = self._context.whole
            self._context.health.begin_drain()
            engine.begin_drain()
            try:
                async with asyncio.timeout(seconds):
                    await engine.drained()
            except TimeoutError:
                logger.warning("Ending the requests that are left")
        await self._stack.aclose()

    @property
    def live(self) -> bool:
        """Whether the engine answers."""
        return self._context.health.live

    @property
    def base(self) -> str:
        """The id of the base model."""
        return self._context.engine.info.model

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """Answer one request by the application."""
        joining = time.monotonic() - self._joined < JOIN_SECONDS
        if joining and call.names and self._context.replicas is not None:
            await asyncio.gather(*(self.ask("catch_up", name) for name in set(call.names)))
        async with aclosing(answer(self._app, call)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    async def ask(self, question: str, *arguments: Any) -> Answer:
        """Answer what another replica asks of all."""
        return await self._self.answer(question, *arguments)

    async def banner(self, address: str) -> str:
        """The text that says what is served at an address."""
        return await self._context.administer(banner, self._context.whole, self._settings, address)

    @property
    def _context(self) -> Context:
        context: Context = self._app.state.context
        return context
