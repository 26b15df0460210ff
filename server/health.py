"""Liveness and readiness: whether the server is alive, and whether it should get requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from reft_runtime.errors import RequestFailed
from reft_runtime.sampling import SamplingParams
from server.following import Follower
from server.schemas.answers.operations import Status

if TYPE_CHECKING:
    from reft_runtime.outputs import ChoiceDelta
    from server.engine import Engine

HEARTBEAT_SECONDS = 10.0
"""An engine loop that has not turned for this long counts as dead."""

CANARY_SECONDS = 300.0


class Health:
    """Liveness and readiness of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._proven = False
        self.draining = False

    async def prove(self) -> None:
        """Generate one token, the canary, to prove that the engine works.

        Raises what the engine raises, `RequestFailed` if there is no token, and `TimeoutError`
        after `CANARY_SECONDS`.
        """
        engine = self._engine
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        [prepared] = await asyncio.to_thread(engine.admission.prepare, ["Hello"], sampling)
        stream = engine.start(prepared)
        tokens: list[int] = []

        def take(_: int, deltas: list[ChoiceDelta]) -> None:
            tokens.extend(token for delta in deltas for token in delta.tokens)

        try:
            async with asyncio.timeout(CANARY_SECONDS):
                await Follower([stream], take).run()
        finally:
            stream.abort()
        if not tokens:
            raise RequestFailed("The canary generation gave no token.")
        self._proven = True

    def begin_drain(self) -> None:
        """Report the server as not ready from now on."""
        self.draining = True

    @property
    def live(self) -> bool:
        """Whether the engine's loop turns."""
        return self._engine.alive and self._engine.stats().heartbeat_age < HEARTBEAT_SECONDS

    @property
    def status(self) -> Status:
        """The word "ok" when the server is ready, else the reason why not."""
        if not self.live:
            return "engine not running"
        if self.draining:
            return "draining"
        return "ok" if self._proven else "starting"
