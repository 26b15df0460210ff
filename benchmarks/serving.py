"""A server in a process of its own, and a client that does no more than read its sockets."""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil

POLLING_SECONDS = 0.005
"""How often the client looks at its sockets. One that woke for each event would take the server's
cores from it 3,000 times in 7 s, which clients on machines of their own do not."""


class Served(NamedTuple):
    """A server that is ready; `banner` is what it printed on its standard output until then."""

    port: int
    process: psutil.Process
    banner: str

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(model: str, dtype: str, settings: Mapping[str, object]) -> Iterator[Served]:
    """A server for the time of the block; `settings` are further options of `reft serve`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"model": model, "dtype": dtype, "port": port, "log_level": "warning", **settings}
    arguments = [
        text
        for name, value in options.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [
        sys.executable,
        "-c",
        "from server.cli.main import main; main()",
        "serve",
        *arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    banner = ""
    try:
        for line in process.stdout:
            if line.startswith("Ready"):
                break
            banner += line
        else:
            raise SystemExit("The server did not start.")
        yield Served(port, psutil.Process(process.pid), banner)
    finally:
        process.terminate()
        process.wait()


def request_bytes(model: str, prompt: list[int], *, stream: bool, answer: int) -> bytes:
    """A whole HTTP request for a completion of `answer` tokens, on a connection that it ends."""
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": answer,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def ask_all(port: int, requests: Sequence[bytes], clients: int) -> list[bytes]:
    """Send each request on a connection of its own, `clients` at a time; returns the answers."""
    answers: list[list[bytes]] = []
    waiting = deque(requests)
    with selectors.DefaultSelector() as selector:

        def send_next() -> None:
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(waiting.popleft())
            connection.setblocking(False)
            answers.append([])
            selector.register(connection, selectors.EVENT_READ, answers[-1])

        for _ in range(min(clients, len(requests))):
            send_next()
        while selector.get_map():
            time.sleep(POLLING_SECONDS)
            for key, _ in selector.select():
                connection: socket.socket = key.fileobj  # type: ignore[assignment]
                data = connection.recv(65536)
                if data:
                    key.data.append(data)
                    continue
                selector.unregister(connection)
                connection.close()
                if waiting:
                    send_next()
    return [b"".join(pieces) for pieces in answers]
