"""A client that leaves frees its place, whatever it was waiting for; one that stays keeps it."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from server.settings import Settings
from tests.http.conftest import chat, completion
from tests.http.fake_engine import FakeEngine


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def send(url: str, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    """Send a request and return its open connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    content = json.dumps(body).encode()
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "Ho", "Ha"]])
async def test_before_the_first_token(
    server_url: str, engine: FakeEngine, stream: bool, prompt: Any
) -> None:
    engine.step_seconds = 1000
    body = completion(prompt=prompt, stream=stream)
    _, writer = await send(server_url, body)
    count = 1 if isinstance(prompt, str) else len(prompt)
    await until(lambda: len(engine.running) == count)
    writer.close()
    await until(lambda: not engine.running)
    assert sum(stream.aborted for stream in engine.streams) == count


@pytest.mark.parametrize("stream", [False, True])
async def test_in_the_middle(server_url: str, engine: FakeEngine, stream: bool) -> None:
    engine.step_seconds = 0.05
    reader, writer = await send(
        server_url, chat(stream=stream, max_tokens=90), "/v1/chat/completions"
    )
    await until(lambda: len(engine.running) == 1)
    if stream:
        await reader.readuntil(b'"content":"b"')
    writer.close()
    await until(lambda: not engine.running)
    assert engine.streams[-1].aborted


async def test_a_client_that_stays_is_served(server_url: str, engine: FakeEngine) -> None:
    engine.step_seconds = 0.01
    async with httpx.AsyncClient() as client:
        for stream in (False, True):
            body = completion(max_tokens=20, stream=stream)
            await client.post(f"{server_url}/v1/completions", json=body)
    assert not any(stream.aborted for stream in engine.streams)


class TestDeadlines:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(first_token_timeout=0.9, request_timeout=1.2)

    async def test_first_token(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        engine.step_seconds = 1000
        response = await client.post("/v1/completions", json=completion(stream=True))
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert "first token" in response.json()["error"]["message"]

    async def test_whole_request(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        engine.step_seconds = 0.1
        response = await client.post("/v1/completions", json=completion(max_tokens=90))
        assert response.status_code == 504  # which nobody is to try again, as reft run does of 503
        assert response.json()["error"]["code"] == "timeout"
        assert "retry-after" not in response.headers
        response = await client.post("/v1/completions", json=completion(max_tokens=90, stream=True))
        assert response.status_code == 200
        *_, error, done, _ = response.text.split("\n\n")
        assert (
            "more than 1.2 seconds" in json.loads(error.removeprefix("data: "))["error"]["message"]
        )
        assert done == "data: [DONE]"
