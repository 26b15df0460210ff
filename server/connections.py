"""All connections of a server: how many there may be, and who has taken too long."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from dataclasses import dataclass
from typing import Protocol

from server.metrics import Metrics

logger = logging.getLogger("reft.server")

RESERVED_FILES = 64
"""Open files that are not left to connections: models, interventions, logs, sockets of others."""

MAX_CONNECTIONS = 16_384
LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a client may take, and how many there may be at once.

    `head` for a request's head, from its first byte; `idle` without any request; `body` without a
    byte of the body, which must also come at `body_rate` bytes a second after that time; `reader`
    without taking what is written to it; `linger` to take an answer that came before the end of
    its request's body.
    """

    connections: int
    head: float = 10.0
    idle: float = 30.0
    body: float = 20.0
    body_rate: float = 16_384.0
    reader: float = 30.0
    linger: float = 2.0


def file_limit() -> int:
    """How many connections the process's limit of open files leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = RESERVED_FILES
    return max(8, min(soft - used - RESERVED_FILES, MAX_CONNECTIONS))


class Connection(Protocol):
    """What is asked of one connection; `since` is when what it is doing began."""

    since: float

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""

    def cut(self, reason: str) -> None:
        """End it now, and count why."""

    def look(self, now: float) -> None:
        """Cut it off if its client has taken too long."""


class Connections:
    """All connections of one server: who may come, and who has taken too long."""

    def __init__(self, metrics: Metrics, limits: Limits) -> None:
        self.limits = limits
        self.metrics = metrics
        self.open: set[Connection] = set()
        self._full = False

    def admit(self, connection: Connection) -> bool:
        """Whether there is room for one more; the one that has been idle longest makes room."""
        if len(self.open) >= self.limits.connections:
            if not self._full:
                self._full = True
                logger.warning(
                    "All %d connections that the limit of open files leaves are in use; raise the "
                    "limit (ulimit -n) if these are clients of yours",
                    self.limits.connections,
                )
            idle = [other for other in self.open if other.idle]
            if not idle:
                self.metrics.cut("limit")
                return False
            min(idle, key=lambda other: other.since).cut("limit")
        elif len(self.open) < 0.9 * self.limits.connections:
            self._full = False
        self.open.add(connection)
        return True

    def close(self, reason: str) -> None:
        """Cut off all that are left, and say how many there were."""
        if self.open:
            logger.warning("Cutting off %d clients that did not take an answer", len(self.open))
        for connection in list(self.open):
            connection.cut(reason)

    async def watch(self) -> None:
        """Look at every connection, again and again."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = asyncio.get_running_loop().time()
            for connection in list(self.open):
                connection.look(now)
