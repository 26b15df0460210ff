"""The metrics on a port of their own, without a key."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from server.foreign_pages import may_be_asked_as
from server.metrics import CONTENT_TYPE, Metrics
from server.settings import Settings

IDLE_SECONDS = 30
"""Seconds for which a connection may be silent."""

MAX_CONNECTIONS = 16
"""Most connections at once; each has a thread."""


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of /metrics."""

    server: _Server
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        if not may_be_asked_as(self.headers.get("host", ""), self.server.settings):
            self.send_error(403)
            return
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        text = self.server.metrics.text()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Log nothing: there is a scrape every few seconds."""


class _Server(ThreadingHTTPServer):
    """An HTTP server with a bound: the oldest connection is closed to make room."""

    def __init__(self, metrics: Metrics, listener: socket.socket, settings: Settings) -> None:
        super().__init__(listener.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()  # the socket that it made itself
        self.socket = listener
        self.metrics, self.settings = metrics, settings
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            # Its own thread closes it, maybe after many more have come: forgotten here, no later
            # one is told to make the same room.
            with suppress(OSError):
                self.connections.pop(0).shutdown(socket.SHUT_RDWR)
        self.connections.append(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with suppress(ValueError):
            self.connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: a client that leaves is no fault of the server."""


@contextmanager
def metrics_served(metrics: Metrics, listener: socket.socket, settings: Settings) -> Iterator[None]:
    """Answer GET and HEAD of /metrics on `listener` as long as the block lasts, then close it.

    Without keys it answers by the same names as the server itself.

    The server has threads of its own, so that a scrape is answered whatever the event loop does.
    It is not `prometheus_client`'s own server, which negotiates a format in which `reft:` becomes
    `reft_`.
    """
    server = _Server(metrics, listener, settings)
    server.server_activate()
    thread = threading.Thread(target=server.serve_forever, args=[0.1])
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
