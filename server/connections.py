"""All connections of a server, with bounds on their number and on their clients' time."""

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
"""Open files reserved for models, interventions, logs and sockets other than connections."""

MAX_CONNECTIONS = 16_384
LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """Most connections at once, and the seconds that a client may take.

    `head` is the time for a request's head, from its first byte. `idle` is the time without any
    request. `body` is the time without a byte of the body; after that time the body must also
    have come at `body_rate` bytes per second. `reader` is the time without reading what is
    written. `linger` is the time to read an answer that came before the end of the request's body.
    """

    connections: int
    head: float = 10.0
    idle: float = 30.0
    body: float = 20.0
    body_rate: float = 16_384.0
    reader: float = 30.0
    linger: float = 2.0


def file_limit() -> int:
    """Number of connections for which the process's limit of open files has room."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = RESERVED_FILES
    return max(8, min(soft - used - RESERVED_FILES, MAX_CONNECTIONS))


class Connection(Protocol):
    """Interface of one connection.

    `since` is when its present activity began, in seconds on the event loop's clock.
    """

    since: float

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""

    def cut(self, reason: str) -> None:
        """End the connection now, and count the reason in the metrics."""

    def look(self, now: float) -> None:
        """Cut the connection off if its client has taken too long by the time `now`."""


class Connections:
    """The open connections of one server: admits new ones and cuts off slow clients."""

    def __init__(self, metrics: Metrics, limits: Limits) -> None:
        self.limits = limits
        self.metrics = metrics
        self.open: set[Connection] = set()
        self._full = False

    def admit(self, connection: Connection) -> bool:
        """Add a connection, in place of the longest idle one if full; False if there is no room."""
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
        """Cut off all connections that are left, and log their number."""
        if self.open:
            logger.warning("Cutting off %d clients that did not take an answer", len(self.open))
        for connection in list(self.open):
            connection.cut(reason)

    async def watch(self) -> None:
        """Check the time limits of every connection each `LOOK_SECONDS`, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = asyncio.get_running_loop().time()
            for connection in list(self.open):
                connection.look(now)
