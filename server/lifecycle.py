"""One server process from start to end: listen, drain on a signal, stop when the engine dies."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from fastapi import FastAPI

from reft_runtime.errors import ConfigError
from reft_runtime.version import VERSION
from server.app import create_app
from server.banner import address_of, announce, banner
from server.connections import Connections, Limits, file_limit
from server.context import Context
from server.metrics_port import metrics_served
from server.protocol import Connection
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine import WholeEngine

logger = logging.getLogger("reft.server")

FLUSH_SECONDS = 5
"""Seconds that finished answers may take to reach slow clients when the server stops."""

WATCH_SECONDS = 0.5


def option(name: str) -> str:
    """A setting as an option of the command line, which is how errors name it by default."""
    return f"--{name.replace('_', '-')}"


def listen(
    host: str, port: int, setting: str = "port", named: Callable[[str], str] = option
) -> socket.socket:
    """Bind a socket to this address; connections are refused until it is served.

    The socket is bound before the model is loaded, so that a port in use is reported at once.
    Raises `ConfigError`, which names the port's `setting` as `named` does.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no host's name"
        raise ConfigError(
            f"Cannot listen on {host} port {port}: {why}. Choose others with {named('host')} and"
            f" {named(setting)}."
        ) from None
    return listener


def check_exposure(
    listener: socket.socket, settings: Settings, named: Callable[[str], str] = option
) -> None:
    """Raise `ConfigError` if other machines could reach a server that needs no key.

    It looks at the address that `listener` is bound to, so that a name counts for what it stands
    for.
    """
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    if settings.needs_key or settings.insecure or address.is_loopback:
        return
    raise ConfigError(
        f"{named('host')}: without keys whoever reaches {settings.host} can use and change"
        f" everything. Give a file by {named('keys')} or set REFT_API_KEY, or listen on 127.0.0.1,"
        f" or say {named('insecure')} if only people you trust can reach it."
    )


def tell_address(listener: socket.socket) -> None:
    """Log the first line of a start: the address at which the server will answer."""
    host, port = listener.getsockname()[:2]
    logger.info("reft-server %s will answer at %s", VERSION, address_of(host, port))


def listen_for_metrics(settings: Settings) -> AbstractContextManager[socket.socket | None]:
    """Bind the socket of the port for metrics, if there is one; raises as `listen` does."""
    if settings.metrics_port is None:
        return nullcontext()
    return listen(settings.host, settings.metrics_port, "metrics_port")


def run(
    engine: WholeEngine,
    settings: Settings,
    listener: socket.socket,
    for_metrics: socket.socket | None = None,
) -> int:
    """Serve until a signal or the engine's end; return the exit status: 0 if drained, else 1."""
    app = create_app(engine, settings)
    context: Context = app.state.context
    server = HttpServer(app, Limits(file_limit()))
    try:
        metrics = context.metrics
        with metrics_served(metrics, for_metrics, settings) if for_metrics else nullcontext():
            server.run(sockets=[listener])
    finally:
        engine.close()
    return 0 if server.drained else 1


class HttpServer(uvicorn.Server):
    """A server that drains on the first signal, exits on the second, and stops with its engine."""

    def __init__(self, app: FastAPI, limits: Limits) -> None:
        self._context: Context = app.state.context
        self._connections = Connections(self._context.metrics, limits)
        # httptools, because h11 takes some 15 microseconds a chunk: megabytes in chunks of one
        # byte would hold the event loop for seconds.
        config = uvicorn.Config(
            app,
            http=cast("type[asyncio.Protocol]", partial(Connection, self._connections)),
            ws="none",
            timeout_keep_alive=int(limits.idle) or 1,
            log_config=None,
            access_log=False,  # `server.logs` says more
            server_header=False,
        )
        super().__init__(config)
        self.drained = False
        self._signalled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Prove the engine, open the socket and print the banner."""
        self._loop = asyncio.get_running_loop()
        # What is loaded by now stays: the garbage collector need not examine it any more.
        gc.freeze()
        await super().startup(sockets)
        if self.started and sockets:
            address = address_of(*sockets[0].getsockname()[:2])
            settings = self._context.settings
            announce(banner(self._context.whole, settings, address), settings)
            self._spawn(self._watch_engine())
            self._spawn(self._connections.watch())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close idle connections; after `FLUSH_SECONDS` cut off those whose answer is not read."""
        cutting = asyncio.get_running_loop().call_later(
            FLUSH_SECONDS, self._connections.close, "shutdown"
        )
        await super().shutdown(sockets)
        cutting.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT; called between two bytecodes of the main thread."""
        if self._signalled or self._loop is None or not self.started:
            os._exit(128 + sig)
        self._signalled = True
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._drain()))

    async def _drain(self) -> None:
        engine, seconds = self._context.whole, self._context.settings.drain_seconds
        logger.info("Shutting down; running requests get %g seconds to finish", seconds)
        self._context.health.begin_drain()
        engine.begin_drain()
        try:
            async with asyncio.timeout(seconds):
                await engine.drained()
        except TimeoutError:
            logger.warning("Ending the requests that are left")
        self.drained = True
        await asyncio.to_thread(engine.stop)  # not closed: uploads under way go on
        self.should_exit = True

    async def _watch_engine(self) -> None:
        while self._context.engine.alive:
            await asyncio.sleep(WATCH_SECONDS)
        if not self.drained:
            logger.critical("The engine stopped; so does the server")
            self.should_exit = True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
