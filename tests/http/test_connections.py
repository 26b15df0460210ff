"""What clients do to a connection: too slow, too many, half closed, gone, or not HTTP at all."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import re
import socket
import weakref
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from server.connections import Limits
from server.protocol import _Answered
from server.settings import Settings
from tests.http.conftest import chat, completion
from tests.http.fake_engine import FakeEngine

SOON = 10.0
"""Far more than any deadline of these tests; none of them waits so long."""

QUICK = Limits(100, head=0.3, idle=1.5, body=0.3, body_rate=1e6, reader=0.3, linger=0.3)


def head(path: str = "/v1/completions", method: str = "POST", **headers: Any) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def request(body: dict[str, Any], path: str = "/v1/completions", **headers: Any) -> bytes:
    content = json.dumps(body).encode()
    return head(path, content_length=len(content), **headers) + content


@contextlib.asynccontextmanager
async def connected(url: str, data: bytes = b"", limit: int = 2**16) -> AsyncIterator[Any]:
    """A connection on which `data` was sent, as (reader, writer)."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=limit)
    writer.write(data)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server ends the connection."""
    received = b""
    async with asyncio.timeout(SOON):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(2**16):
                received += piece
    return received


async def cut(url: str, reason: str, count: int = 1) -> None:
    """Wait until so many connections were cut for this reason."""
    async with asyncio.timeout(SOON), httpx.AsyncClient() as client:
        while True:
            text = (await client.get(f"{url}/metrics", headers={"authorization": "Bearer k"})).text
            found = re.search(rf'reft:connections_cut_total{{reason="{reason}"}} (\d+)', text)
            if found and int(found[1]) >= count:
                return
            await asyncio.sleep(0.02)


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


class TestDeadlines:
    @pytest.fixture
    def limits(self) -> Limits:
        return QUICK

    @pytest.mark.parametrize(
        ("sent", "reason", "answer"),
        [
            (b"", None, None),
            (b"POST /v1/comp", "head", 408),
            (head()[:-2] + b"x: y\r\n", "head", 408),
            (head(content_length=100), "body", 408),
            (head(content_length=100) + b'{"model"', "body", 408),
            (head(transfer_encoding="chunked") + b"5\r\n{", "body", 408),
            (head("/livez", "GET") + head()[:10], "head", 200),
        ],
    )
    async def test_who_is_too_slow_is_let_go(
        self, server_url: str, sent: bytes, reason: str | None, answer: int | None
    ) -> None:
        async with connected(server_url, sent) as (reader, _):
            got = await rest(reader)
            if answer is None:
                assert got == b""
            else:
                assert status(got) == answer
        if reason is not None:
            await cut(server_url, reason)

    @pytest.mark.parametrize(
        ("sent", "answer"),
        [
            (head(content_length=100) + b"{", 408),
            (head(transfer_encoding="chunked") + b"no size\r\n", 400),
        ],
    )
    async def test_the_log_tells_the_answer_of_a_refused_body(
        self, server_url: str, caplog: pytest.LogCaptureFixture, sent: bytes, answer: int
    ) -> None:
        """And not that its client left."""
        with caplog.at_level(logging.INFO, "reft.requests"):
            async with connected(server_url, sent) as (reader, _):
                assert status(await rest(reader)) == answer
            async with asyncio.timeout(SOON):
                while not (told := [r for r in caplog.records if r.name == "reft.requests"]):
                    await asyncio.sleep(0.01)
        assert [vars(record)["request"]["status"] for record in told] == [answer]

    @pytest.mark.parametrize("start", [b"", head(content_length=10_000)])
    async def test_a_byte_now_and_then_is_too_slow(self, server_url: str, start: bytes) -> None:
        async with connected(server_url, start or b"GET /livez HTTP/1.1\r\n") as (reader, writer):

            async def trickle() -> None:
                with contextlib.suppress(ConnectionError):
                    while True:
                        writer.write(b" " if start else b"x: y\r\n")
                        await asyncio.sleep(0.05)

            trickling = asyncio.ensure_future(trickle())
            assert status(await rest(reader)) == 408
            trickling.cancel()
        await cut(server_url, "body" if start else "head")

    async def test_who_does_not_read_is_let_go(self, server_url: str, engine: FakeEngine) -> None:
        engine.names = 20_000
        engine.__post_init__()
        async with connected(server_url, head("/v1/models", "GET"), limit=1):
            await cut(server_url, "reader")

    async def test_an_answer_may_take_longer(self, server_url: str, engine: FakeEngine) -> None:
        engine.step_seconds = 0.5
        for stream in (False, True):
            body = completion(max_tokens=4, stream=stream)
            async with connected(server_url, request(body, connection="close")) as (reader, _):
                answer = await rest(reader)
            assert status(answer) == 200
            assert b"length" in answer


class TestRoom:
    @pytest.fixture
    def limits(self) -> Limits:
        return Limits(3)

    async def test_the_idlest_makes_room(
        self, server_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "reft.server")
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                await stack.enter_async_context(connected(server_url))
            async with connected(server_url, head("/livez", "GET", connection="close")) as (r, _):
                assert status(await rest(r)) == 200
        lines = [record for record in caplog.records if "open files" in record.message]
        assert len(lines) == 1

    async def test_who_is_served_stays(self, server_url: str, engine: FakeEngine) -> None:
        engine.step_seconds = 0.05
        data = request(completion(max_tokens=20), connection="close")
        async with contextlib.AsyncExitStack() as stack:
            served = [await stack.enter_async_context(connected(server_url, data)) for _ in "abc"]
            while len(engine.running) < 3:
                await asyncio.sleep(0.01)
            async with connected(server_url, head("/livez", "GET")) as (reader, _):
                refused = await rest(reader)
            assert status(refused) == 503
            assert b"retry-after: 1\r\n" in refused
            assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"
            for reader, _ in served:
                assert status(await rest(reader)) == 200


@pytest.mark.parametrize(
    "data",
    [
        head(content_length=5, transfer_encoding="chunked")
        + b"0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n",
        head(transfer_encoding="chunked", content_length=5)
        + b"0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n",
        head(Transfer_Encoding="Chunked", CONTENT_LENGTH=0) + b"0\r\n\r\n",
        head(content_length=5, content_Length=6) + b"x" * 6,
        head(content_length="5, 5") + b"x" * 5,
        head(content_length="+5") + b"x" * 5,
        head(transfer_encoding="identity") + b"x" * 5,
        head(transfer_encoding="chunked, identity") + b"0\r\n\r\n",
        head(transfer_encoding="identity, chunked") + b"0\r\n\r\n",
        head(transfer_encoding="gzip, chunked") + b"0\r\n\r\n",
        head(Transfer_Encoding="identity", transfer_encoding="chunked") + b"0\r\n\r\n",
        head(transfer_encoding="chunked") + b"5;\r\r\n{}\r\n0\r\n\r\n",
        head(transfer_encoding="chunked") + b"-1\r\n{}\r\n0\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: x\r\n folded: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost : x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: x\r\nHost: y\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhosts: x\r\n\r\n",
        b"GET  /livez\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-x\r\n",
    ],
)
async def test_what_two_servers_might_read_otherwise(server_url: str, data: bytes) -> None:
    async with connected(server_url, data) as (reader, _):
        answer = await rest(reader)
    assert status(answer) == 400
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"connection: close\r\n" in answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"GET /livez HTTP/1.1\r\nx: ", b"y" * 1000),
        (b"GET /livez HTTP/1.1\r\n", b"x: y\r\n" * 100),
        (b"GET /", b"x" * 1000),
        (head(transfer_encoding="chunked") + b"0\r\n", b"x: y\r\n" * 100),
    ],
)
async def test_heads_are_bounded_while_they_come(
    server_url: str, start: bytes, more: bytes
) -> None:
    async with connected(server_url, start) as (reader, writer):
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                writer.write(more)
                await writer.drain()
        assert status(await rest(reader)) in (400, 431)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions", "models", "tokenize"])
async def test_a_client_that_says_no_more_is_answered(
    server_url: str, engine: FakeEngine, stream: bool, route: str
) -> None:
    engine.step_seconds = 0.03
    if route == "models":
        data = head("/v1/models", "GET")
    elif route == "tokenize":
        data = request({"prompt": "Hi"}, "/tokenize")
    else:
        body = (chat if "chat" in route else completion)(stream=stream, max_tokens=6)
        data = request(body, f"/v1/{route}")
    async with connected(server_url, data) as (reader, writer):
        writer.write_eof()
        answer = await rest(reader)
    assert status(answer) == 200
    assert answer.count(b"HTTP/1.1") == 1
    if "completions" in route:
        assert b'"finish_reason":"length"' in answer
        assert not any(stream.aborted for stream in engine.streams)


@pytest.mark.parametrize("half_closed", [False, True])
@pytest.mark.parametrize("route", ["stream", "whole", "listing"])
async def test_a_client_of_http_1_0_gets_no_chunks(
    server_url: str, engine: FakeEngine, route: str, half_closed: bool
) -> None:
    engine.step_seconds = 0.03
    if route == "listing":
        data = head("/v1/interventions", "GET")
    else:
        data = request(completion(stream=route == "stream", max_tokens=6))
    async with connected(server_url, data.replace(b"HTTP/1.1", b"HTTP/1.0", 1)) as (
        reader,
        writer,
    ):
        if half_closed:
            writer.write_eof()
        answer = await rest(reader)
    assert status(answer) == 200
    start, _, body = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in start
    assert b"connection: close" in start
    if route == "stream":
        events = [event for event in body.decode().split("\n\n") if event not in ("", ":")]
        assert events.pop() == "data: [DONE]"
        read = [json.loads(event.removeprefix("data: ")) for event in events]
        assert read[-1]["choices"][0]["finish_reason"] == "length"
    else:
        assert json.loads(body)["object"] == ("list" if route == "listing" else "text_completion")


async def test_a_client_of_http_1_0_need_not_name_a_host(server_url: str) -> None:
    async with connected(server_url, b"GET /livez HTTP/1.0\r\n\r\n") as (reader, _):
        assert status(await rest(reader)) == 200


async def test_all_of_several_requests_are_answered(server_url: str) -> None:
    data = head("/livez", "GET") + request(completion()) + head("/version", "GET")
    async with connected(server_url, data) as (reader, writer):
        writer.write_eof()
        answer = await rest(reader)
    assert answer.count(b"HTTP/1.1 200 OK") == 3


async def test_a_packet_of_thousands_of_requests_is_refused(server_url: str) -> None:
    """Reading all of them would hold the event loop for most of a second."""
    async with connected(server_url, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 3000) as (
        reader,
        _,
    ):
        answer = await rest(reader)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert status(answer) == 400


@pytest.mark.parametrize("sent", [b"{", b'{"prompt": "x"}' + b" " * 100_000])
@pytest.mark.parametrize("way", ["content-length", "chunked"])
async def test_a_client_that_hangs_up_is_silent(
    server_url: str, caplog: pytest.LogCaptureFixture, sent: bytes, way: str
) -> None:
    chunked = way == "chunked"
    start = head(transfer_encoding="chunked") if chunked else head(content_length=900_000)
    async with connected(server_url, start + (b"fffff\r\n" if chunked else b"") + sent):
        await asyncio.sleep(0.1)
    await cut(server_url, "left")
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_a_client_that_leaves_several_requests_leaves_the_first(
    server_url: str, engine: FakeEngine
) -> None:
    engine.step_seconds = 0.05
    engine.info = dataclasses.replace(engine.info, max_model_len=20_000)
    data = request(completion(max_tokens=10_000)) + head("/livez", "GET")
    async with connected(server_url, data):
        while not engine.running:
            await asyncio.sleep(0.01)
    async with asyncio.timeout(SOON):
        while engine.running:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_an_answer_is_counted(
    server_url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    engine.step_seconds = 0.05
    async with connected(server_url, request(completion(max_tokens=90, stream=stream))):
        while not engine.running:
            await asyncio.sleep(0.01)
    await cut(server_url, "left")
    while engine.running:
        await asyncio.sleep(0.01)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_pieces_of_a_stream_are_written_without_a_send(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send = RequestResponseCycle.send

    async def noted(cycle: RequestResponseCycle, message: Any) -> None:
        sent.append(message["type"])
        await send(cycle, message)

    monkeypatch.setattr(RequestResponseCycle, "send", noted)
    data = request(completion(max_tokens=20, stream=True), connection="close")
    async with connected(server_url, data) as (reader, _):
        answer = await rest(reader)
    pieces = re.findall(rb'"text":"(.)"', answer)
    assert b"".join(pieces) == b"abcdefghijklmnopqrst"
    assert answer.endswith(b"\r\n0\r\n\r\n")
    # The head, the first piece, what ends the stream, and the end of the answer.
    assert sent == ["http.response.start", *["http.response.body"] * 3]


async def test_a_stream_waits_for_a_client_that_does_not_read(
    server_url: str, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = 0
    send = RequestResponseCycle.send

    async def counted(cycle: RequestResponseCycle, message: Any) -> None:
        nonlocal sends
        sends += 1
        await send(cycle, message)

    monkeypatch.setattr(RequestResponseCycle, "send", counted)
    engine.info = dataclasses.replace(engine.info, max_model_len=20_000)
    body = completion(max_tokens=16_000, stream=True, user="u" * 1000, n=2)
    parts = urlsplit(server_url)
    with socket.socket() as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the rest is the server's
        small.connect((parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=small, limit=1)
        writer.write(request(body, connection="close"))
        # The first stream is that with which the server proves itself at its start.
        while len(engine.streams) < 2 or not engine.streams[1].ended:
            await asyncio.sleep(0.02)
        answer = await rest(reader)
        writer.close()
    for index in range(2):
        said = re.findall(rb'"index":%d,"text":"([a-z]*)"' % index, answer)
        assert b"".join(said) == (bytes(range(97, 123)) * 700)[:16_000]
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert sends > 4  # the last of what was written had to wait


async def test_an_answered_request_is_forgotten_without_a_collection(
    server_url: str, engine: FakeEngine
) -> None:
    gc.collect()
    gc.disable()
    try:
        async with httpx.AsyncClient() as client:
            for _ in range(5):
                await client.post(f"{server_url}/v1/completions", json=completion())
            streams = [weakref.ref(stream) for stream in engine.streams]
            engine.streams.clear()
            assert sum(stream() is not None for stream in streams) <= 1
    finally:
        gc.enable()


async def test_a_connection_is_used_again(server_url: str) -> None:
    async with connected(server_url) as (reader, writer):
        for _ in range(5):
            for body in (completion(), completion(model="nobody")):
                writer.write(request(body))
                answer = await reader.readuntil(b"\r\n\r\n")
                assert b"connection: close" not in answer
                found = re.search(rb"content-length: (\d+)", answer)
                assert found
                await reader.readexactly(int(found[1]))


@pytest.mark.parametrize(
    "split",
    [None, b"{", b"\r\n\r\n", b"\n\r\n{", b"\r\nupgrade", b"\nupgrade", b"upgrade:", b"ade:", b":"],
)
async def test_an_offer_of_http_2_is_declined(
    server_url: str, caplog: pytest.LogCaptureFixture, split: bytes | None
) -> None:
    """Java's own client makes one with every first request; wherever its packets end."""
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAE"}
    data = request(completion(), **offer)
    async with connected(server_url) as (reader, writer):
        for _ in range(2):
            start = len(data) if split is None else data.index(split)
            writer.write(data[:start])
            if split is not None:
                await writer.drain()
                await asyncio.sleep(0.05)
                writer.write(data[start:])
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON)
            assert status(answer) == 200
            found = re.search(rb"content-length: (\d+)", answer)
            assert found
            await reader.readexactly(int(found[1]))
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
async def test_packets_may_end_anywhere(server_url: str, size: int) -> None:
    content = json.dumps(completion()).encode() + b"\r\n"
    data = head(content_length=len(content)) + content + head("/livez", "GET")
    async with connected(server_url) as (reader, writer):
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write_eof()
        assert (await rest(reader)).count(b"HTTP/1.1 200 OK") == 2


async def test_a_client_that_leaves_after_a_refusal_is_silent(
    server_url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.step_seconds = 0.2
    async with connected(server_url, request(completion()) + b"no HTTP\r\n\r\n") as (
        reader,
        writer,
    ):
        assert status(await rest(reader)) == 400
        writer.write_eof()
        await asyncio.sleep(0.1)
    assert [r for r in caplog.records if r.name == "asyncio" or r.exc_info] == []


async def test_a_stream_ends_where_its_client_sends_no_http(
    server_url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.step_seconds = 0.05
    async with connected(server_url, request(completion(max_tokens=90, stream=True))) as (
        reader,
        writer,
    ):
        await reader.readuntil(b"data: ")
        writer.write(b"no HTTP\r\n\r\n")
        answer = await rest(reader)
        while engine.running:
            await asyncio.sleep(0.01)
    assert b"HTTP/1.1 " not in answer
    assert b"[DONE]" not in answer
    assert [r for r in caplog.records if r.name == "asyncio" or r.exc_info] == []


class TestUnread:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(api_key=SecretStr("k"))

    @pytest.mark.parametrize(
        ("headers", "wanted"),
        [({}, 401), ({"authorization": "Bearer k"}, 413)],
    )
    async def test_an_answer_before_the_end_of_the_body_reaches_its_client(
        self, server_url: str, headers: dict[str, str], wanted: int
    ) -> None:
        """And what still comes of the body is taken, but not parsed, however many chunks it has."""
        start = head(transfer_encoding="chunked", **headers)
        async with connected(server_url, start) as (reader, writer):
            with contextlib.suppress(ConnectionError):
                for _ in range(100):
                    writer.write(b"fffff\r\n" + b" " * 0xFFFFF + b"\r\n")
                    await writer.drain()
            answer = await rest(reader)
        assert status(answer) == wanted
        assert b"connection: close\r\n" in answer


@pytest.mark.parametrize(
    ("kind", "comments"), [("text/event-stream; charset=utf-8", True), ("application/json", False)]
)
def test_only_streams_of_events_may_have_comments(kind: str, comments: bool) -> None:
    """A client of a listing that half closes while it is written got one in its JSON."""
    answer = _Answered(MagicMock())
    answer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n\r\n".encode())
    answer.write(b"1\r\n{\r\n")
    answer.write(b"\r\ncontent-type: text/event-stream")  # of a file
    assert answer.may_have_comments == comments


def test_chunks_without_their_marks() -> None:
    """As uvicorn writes them: an empty one as nothing, and the last one maybe behind another."""
    connection = MagicMock()
    connection.parser.get_http_version.return_value = "1.0"
    answer = _Answered(connection)
    head = b"HTTP/1.1 200 OK\r\nx: y\r\n"
    for data in (
        head + b"transfer-encoding: chunked\r\n\r\n",
        b"",
        b"10\r\n0123456789abcd\r\n\r\n",
        b"1\r\n!\r\n0\r\n\r\n",
        b"0\r\n\r\n",
    ):
        answer.write(data)
    written = b"".join(call.args[0] for call in connection.transport.write.call_args_list)
    assert written == head + b"\r\n0123456789abcd\r\n!"
