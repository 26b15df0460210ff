"""The metrics' own port: who is closed where more connect than it holds."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from http.server import ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from server.metrics import Metrics
from server.metrics_port import MAX_CONNECTIONS, metrics_served
from server.settings import Settings
from tests.http.fake_engine import FakeEngine


def test_a_burst_closes_the_oldest_before_any_thread_has_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = threading.Event()
    run = ThreadingHTTPServer.process_request_thread

    def late(self: ThreadingHTTPServer, *connection: Any) -> None:
        go.wait(60)
        run(self, *connection)

    monkeypatch.setattr(ThreadingHTTPServer, "process_request_thread", late)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = listener.getsockname()
    with metrics_served(Metrics.__new__(Metrics), listener, Settings()), ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=20))
            for _ in range(2 * MAX_CONNECTIONS)
        ]
        try:
            for client in clients[:MAX_CONNECTIONS]:
                assert client.recv(1) == b""
            clients[-1].setblocking(False)
            with pytest.raises(BlockingIOError):
                clients[-1].recv(1)
        finally:
            go.set()


@pytest.mark.parametrize(
    ("settings", "status"),
    [(Settings(), 403), (Settings(insecure=True), 200), (Settings(api_key=SecretStr("key")), 200)],
)
def test_what_it_answers(settings: Settings, status: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"
    with metrics_served(Metrics(FakeEngine()), listener, settings):
        whole, head = httpx.get(url), httpx.head(url)
        named = httpx.get(url, headers={"host": "any.example"})
        other = httpx.head(url.removesuffix("metrics"))
    assert (whole.status_code, head.status_code, other.status_code) == (200, 200, 404)
    assert "reft:num_requests_running" in whole.text
    assert head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert named.status_code == status
