"""What may come as a body: JSON of one form, within bounds on its bytes and its parts."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.http.conftest import completion

MANY = 390_000
STRICT_JSON = "reft_runtime.interventions.format.strict_json"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('"k%d": 1', "strings and keys"),
        ('"logit_bias": {%s}', "strings and keys"),
        ('"metadata": {%s}', "strings and keys"),
        ('"messages": [{%s}]', "strings and keys"),
        ('"prompt": [' + "1," * 300_000 + "1]", "values"),
        ('"prompt": [' + "[1]," * 150_000 + "[1]]", "values"),
        ('"prompt": ' + "[" * 300_000, "values"),
        ('"metadata": {' + ",".join(f'"{i}": "\\"' for i in range(MANY // 2)) + "}", "strings"),
        ('"metadata": {' + ",".join(f'"{i}": 1' for i in range(2049)) + "}", "2048 keys"),
    ],
)
async def test_bodies_of_very_many_parts_are_not_parsed(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    if "2048" not in message:
        parser = SimpleNamespace(loads=lambda *_, **__: pytest.fail("parsed"))
        monkeypatch.setattr(f"{STRICT_JSON}.json", parser)
    many = ",".join(f'"{i}":1' for i in range(MANY))
    text = "{" + body.replace("%s", many).replace('"k%d": 1', many) + "}"
    headers = {"content-type": "application/json"}
    response = await client.post("/v1/completions", content=text.encode(), headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("text", [b"a" * 200_000, b'\\"' * 200_000, b"\\" * 200_001, b"\n" * 9])
async def test_a_string_without_an_end_is_passed_once(
    client: httpx.AsyncClient, text: bytes
) -> None:
    # Behind so many commas strings are looked for; again and again, one would stop the process.
    response = await client.post(
        "/v1/completions",
        content=b"[" + b"," * 300_000 + b'"' + text,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert "values" in response.json()["error"]["message"]


async def test_commas_within_text_are_no_values(client: httpx.AsyncClient) -> None:
    metadata = {"text": 'a,[{"\\,"' * 150_000, "more": '",'}
    response = await client.post("/v1/completions", json=completion(metadata=metadata))
    assert response.status_code == 200


async def test_a_large_body_is_read_beside_the_event_loop(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def note(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return json.JSONDecoder(**options).decode(*arguments)

    monkeypatch.setattr(f"{STRICT_JSON}.json", SimpleNamespace(loads=note))
    for metadata in ({}, {"x": "y" * 20_000}):
        response = await client.post("/v1/completions", json=completion(metadata=metadata))
        assert response.status_code == 200
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"x"', None),
        (b"null", None),
        (b"\xff\xfe", None),
        (b'{"model": "tiny", "prompt": "\xff"}', None),
        (b"[" * 100_000, None),
        (b'{"a":' * 50_000, None),
        (b'{"model": "tiny", "model": "tiny", "prompt": "x"}', "model"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', None),
        (b'{"model": "tiny", "prompt": "x", "temperature": Infinity}', None),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", None),
        (b'{"model": "tiny", "prompt": "\\ud800"}', None),
        (b'{"model": "\\ud800", "prompt": "x"}', None),
        (b'{"model": "tiny", "prompt": "x", "\\ud800": 1}', None),
        (b'{"model": "tiny", "prompt": "x", "' + b"k" * 100_000 + b'": 1}', "k" * 500 + "..."),
    ],
)
async def test_bad_json(client: httpx.AsyncClient, body: bytes, param: str | None) -> None:
    response = await client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "x"])
async def test_wrong_content_type(client: httpx.AsyncClient, kind: str) -> None:
    response = await client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415


async def test_a_compressed_body(client: httpx.AsyncClient) -> None:
    body = gzip.compress(b'{"model": "tiny", "prompt": "Hi"}')
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    for response in (
        await client.post("/v1/completions", content=body, headers=headers),
        await client.put("/v1/interventions/new", content=body, headers=headers),
    ):
        assert response.status_code == 415
        assert "without Content-Encoding" in response.json()["error"]["message"]
        assert response.headers["accept-encoding"] == "identity"
    headers["content-encoding"] = "Identity"
    body = gzip.decompress(body)
    assert (await client.post("/v1/completions", content=body, headers=headers)).status_code == 200


async def test_body_one_byte_too_long(client: httpx.AsyncClient, app: Any) -> None:
    limit = app.state.context.settings.max_body_bytes
    headers = {"content-type": "application/json"}

    async def chunks(size: int) -> Any:
        yield b'{"model": "tiny", "prompt": "Hi"}'.ljust(size)

    whole = b'{"model": "tiny", "prompt": "Hi"}'.ljust(limit + 1)
    assert (await client.post("/v1/completions", content=whole, headers=headers)).status_code == 413
    for size, status in ((limit, 200), (limit + 1, 413)):
        response = await client.post("/v1/completions", content=chunks(size), headers=headers)
        assert response.status_code == status


async def test_bodies_under_way_share_one_bound(client: httpx.AsyncClient, app: FastAPI) -> None:
    bodies = app.state.context.bodies
    bodies.limit = 1000
    more, arrived = asyncio.Event(), asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield b'{"model": "tiny", "prompt": "' + b"x" * 50
        arrived.set()
        await more.wait()
        yield b'", "max_tokens": 1}'

    headers = {"content-type": "application/json"}
    first = asyncio.ensure_future(
        client.post("/v1/completions", content=stalled(), headers=headers)
    )
    await arrived.wait()
    for path, method in (("/v1/completions", "POST"), ("/v1/interventions/x", "PUT")):
        response = await client.request(method, path, content=b" " * 950, headers=headers)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.json()["error"]["code"] == "overloaded"
    more.set()
    assert (await first).status_code == 200
    assert bodies.held == 0
    refused = await client.post("/v1/completions", content=b" " * 950, headers=headers)
    assert refused.status_code == 400  # there is room for it now
    assert bodies.held == 0
