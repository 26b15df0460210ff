"""Ctrl-C while a server answers several requests at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from reft_runtime.client import Server

SECONDS = 20.0
"""No answer comes earlier; a test that waited for one would take as long."""


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that takes connections, and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_ctrl_c_ends_the_requests_that_are_under_way(silent: socket.socket) -> None:
    left = threading.Event()

    def serve() -> None:
        with suppress(OSError):
            connection, _ = silent.accept()
            with connection:
                connection.settimeout(SECONDS)
                connection.recv(1 << 16)
                os.kill(os.getpid(), signal.SIGINT)
                while connection.recv(1 << 16):
                    pass
                left.set()

    thread = threading.Thread(target=serve)
    thread.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Server(f"http://127.0.0.1:{silent.getsockname()[1]}").ask([("/v1/completions", {})])
    assert time.monotonic() - began < SECONDS / 2
    thread.join()
    assert left.is_set(), "the server was not told"
