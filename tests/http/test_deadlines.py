"""How long a client may take: not cut off a moment before a deadline, and cut off behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from server.connections import Connections, Limits
from server.protocol import CLOSE_WAIT, STALLED_SECONDS, Connection

LIMITS = Limits(100, head=3, idle=5, body=7, body_rate=10, reader=11, linger=2)
MOMENT = 0.01
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n"
WHOLE = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Client(asyncio.Transport):
    """The other side of a connection, and the clock: what it got, and how the connection ended."""

    def __init__(self) -> None:
        super().__init__()
        self.got = b""
        self.end = ""
        self.metrics = MagicMock()
        self.socket = MagicMock(family=socket.AF_UNIX)
        self.now = 1000.0
        self.may_answer = asyncio.Event()
        self.state = ServerState()
        loop = MagicMock(wraps=asyncio.get_running_loop())
        loop.time = lambda: self.now
        config = Config(self._answer, interface="asgi3", log_config=None)
        connections = Connections(self.metrics, LIMITS)
        self.server = Connection(
            connections, config=config, server_state=self.state, app_state={}, _loop=loop
        )
        self.server.connection_made(self)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"ok"})

    async def answered(self) -> None:
        """Let the requests that wait be answered, and those behind them wait."""
        self.may_answer.set()
        async with asyncio.timeout(10):
            while b"ok" not in self.got:
                await asyncio.sleep(0)
        self.may_answer.clear()

    def later(self, seconds: float) -> Client:
        """Time passes, and nobody looks."""
        self.now += seconds
        return self

    def send(self, data: bytes) -> Client:
        self.server.data_received(data)
        return self

    def spared(self, seconds: float) -> Client:
        """Time passes, and whoever looks lets the client be."""
        self.later(seconds)
        before = self.got, self.end, self.metrics.mock_calls.copy()
        self.server.look(self.now)
        assert before == (self.got, self.end, self.metrics.mock_calls)
        return self

    def cut(self, seconds: float, reason: str | None) -> Client:
        """Neither before so many seconds have passed, nor later."""
        self.spared(seconds).later(MOMENT).server.look(self.now)
        counted = [call.args[0] for call in self.metrics.cut.call_args_list]
        assert counted == ([] if reason is None else [reason])
        return self

    # What the server calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.socket if name == "socket" else default

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.got += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.got += b"<eof>"

    def close(self) -> None:
        self.end = self.end or "closed"

    def abort(self) -> None:
        self.end = "aborted"

    def is_closing(self) -> bool:
        return self.end != ""

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    made = Client()
    yield made
    made.server.connection_lost(None)
    for task in made.state.tasks.copy():
        task.cancel()
        await asyncio.wait([task])


async def test_no_request(client: Client) -> None:
    assert client.cut(LIMITS.idle, None).end == "closed"
    assert client.got == b""


async def test_a_head(client: Client) -> None:
    """From its first byte on, however many follow."""
    client.spared(4).send(HEAD[:5]).spared(2).send(HEAD[5:9]).cut(LIMITS.head - 2, "head")
    assert client.got.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_pauses(client: Client) -> None:
    client.later(4).send(HEAD[:5]).later(2).send(HEAD[5:]).spared(6).send(b"{" * 100)
    assert client.cut(LIMITS.body, "body").got.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_comes_slowly(client: Client) -> None:
    """Its rate counts once it has had the time of a pause: 60 bytes are enough for 6 seconds."""
    client.send(HEAD[:5]).later(2).send(HEAD[5:])
    for _ in range(6):
        client.spared(1).send(b"x" * 10)
    client.spared(LIMITS.body - 6).cut(6, "body")
    assert client.got.startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_does_not_come_while_the_server_stops(client: Client) -> None:
    client.send(HEAD).spared(STALLED_SECONDS + 1).send(b"{").server.shutdown()
    assert client.cut(STALLED_SECONDS, "shutdown").end == "closed"
    assert client.got.startswith(b"HTTP/1.1 503 ")
    assert b"\r\nretry-after: 5\r\n" in client.got


async def test_an_answer_has_no_deadline(client: Client) -> None:
    """And the time that a client may be without a request begins behind it."""
    client.send(WHOLE).spared(1000)
    await client.answered()
    assert client.cut(LIMITS.idle, None).end == "closed"


async def test_a_body_behind_an_answer(client: Client) -> None:
    """What a client sends once it has its first answer is not late."""
    client.send(WHOLE + HEAD).spared(1000)
    await client.answered()
    assert client.cut(LIMITS.body, "body").got.count(b"HTTP/1.1 ") == 2


async def test_reading(client: Client) -> None:
    """A client that read again has all of the time again."""
    client.send(WHOLE).server.pause_writing()
    client.spared(LIMITS.reader).server.resume_writing()
    client.spared(1000).server.pause_writing()
    assert client.cut(LIMITS.reader, "reader").end == "aborted"


async def test_reading_a_refusal(client: Client) -> None:
    """What is sent meanwhile is not answered, and puts nothing off."""
    client.spared(4).send(b"no HTTP\r\n\r\n").spared(1).send(HEAD)
    assert client.cut(LIMITS.linger - 1, None).end == "aborted"
    assert client.got.startswith(b"HTTP/1.1 400 ")
    assert client.got.endswith(b"<eof>")
    assert client.got.count(b"HTTP/1.1 ") == 1


async def test_reading_the_last_answer(client: Client) -> None:
    """A connection that is closing has yet to send what was written."""
    client.send(WHOLE.replace(b"host", b"connection: close\r\nhost")).later(1)
    await client.answered()
    assert client.end == "closed"
    assert client.cut(LIMITS.reader, None).end == "aborted"


async def test_there_is_no_room(client: Client) -> None:
    full = cast(Any, client.server)._all
    full.limits = Limits(0)
    full.open.clear()
    client.server.connection_made(client)
    assert client.got.startswith(b"HTTP/1.1 503 ")
    assert client.send(WHOLE).cut(LIMITS.linger, "limit").end == "aborted"
    assert client.got.count(b"HTTP/1.1 ") == 1


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="this system does not tell")
async def test_a_client_that_says_no_more(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for until it has left: news of that may take longer than one look."""
    monkeypatch.setattr("server.protocol.PROBE_SECONDS", 0.0)
    states = [CLOSE_WAIT, CLOSE_WAIT, 7]
    client.socket.getsockopt.side_effect = [bytes([state]) for state in states]
    assert client.send(WHOLE).server.eof_received()
    assert client.got == b"H"
    async with asyncio.timeout(10):
        while not client.end:
            await asyncio.sleep(0)
    assert client.end == "aborted"
    assert client.socket.getsockopt.call_count == 3
