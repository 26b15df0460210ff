"""The connections over which rank 0 tells the other ranks what to do, and hears why one fails.

They are sockets of one address, and whoever connects must know a key. Objects cross them pickled.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from typing import Any


def listener(host: str, key: bytes, ranks: int) -> Listener:
    """Listen at a free port of `host` alone for the connections of `ranks` ranks."""
    return Listener((host, 0), "AF_INET", backlog=ranks, authkey=key)


def connect(host: str, port: int, key: bytes, rank: int) -> Connection:
    """Connect to rank 0 and say which rank this is."""
    found = Client((host, port), "AF_INET", authkey=key)
    _send_at_once(found)
    found.send_bytes(str(rank).encode())
    return found


def accept(place: Listener) -> tuple[int, Connection]:
    """Wait for a rank; returns its number and the connection to it."""
    found: Any = place.accept()
    _send_at_once(found)
    return int(found.recv_bytes()), found


def send(connections: Iterable[Connection], message: object) -> None:
    """Send an object over connections. Raises `OSError` if the other end of one is gone."""
    content = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    for connection in connections:
        connection.send_bytes(content)


def receive(connection: Connection) -> Any:
    """Wait for an object. Raises `EOFError` or `OSError` if the other end is gone."""
    return pickle.loads(connection.recv_bytes())  # noqa: S301 - the other end knows the key


def address(connection: Connection) -> str:
    """The address of this machine that the connection has."""
    with _socket(connection) as same:
        found: str = same.getsockname()[0]
    return found


def end(connection: Connection) -> None:
    """Close a connection, also for a thread that receives at this end; it may be closed before."""
    if not connection.closed:
        with suppress(OSError), _socket(connection) as same:  # the other end may be gone
            same.shutdown(socket.SHUT_RDWR)
        connection.close()


def _send_at_once(connection: Connection) -> None:
    """Let no small message wait until the one before it is acknowledged."""
    with _socket(connection) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _socket(connection: Connection) -> socket.socket:
    return socket.socket(fileno=socket.dup(connection.fileno()))
