"""What a request applies is held from the moment that its name is resolved; the engine is real."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from reft_runtime import Engine
from server.app import create_app
from server.settings import Settings
from tests.helpers.models import MAX_LENGTH, tiny
from tests.helpers.serving import client_of
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import file_bytes


@pytest.fixture(scope="module")
def tiny_engine() -> Iterator[Engine]:
    with Engine(tiny("llama"), tokenizer=tiny_tokenizer(), max_queued=1, max_running=1) as engine:
        engine.registry.put("task", file_bytes(base=engine.registry.base))
        yield engine


@pytest.fixture
async def http(tiny_engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(tiny_engine, Settings())) as client:
        yield client
    await until_nothing_is_held(tiny_engine)
    tiny_engine.check_integrity()


def held(engine: Engine) -> int:
    return engine.registry.entry("task").in_flight


async def until_nothing_is_held(engine: Engine) -> None:
    async with asyncio.timeout(10):
        while held(engine):
            await asyncio.sleep(0.01)


async def complete(http: httpx.AsyncClient, prompt: Any, **fields: Any) -> httpx.Response:
    body = {"model": "task", "prompt": prompt, "max_tokens": 2, **fields}
    return await http.post("/v1/completions", json=body)


async def test_one_trip_to_a_thread_with_the_version_held(
    http: httpx.AsyncClient, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, to_thread = tiny_engine.tokenizer.encode, asyncio.to_thread
    trips, seen = [], []

    def noted(*args: Any, **kwargs: Any) -> list[int]:
        seen.append(held(tiny_engine))
        return encode(*args, **kwargs)

    async def counted(work: Any, *args: Any, **kwargs: Any) -> Any:
        trips.append(work)
        return await to_thread(work, *args, **kwargs)

    monkeypatch.setattr(tiny_engine.tokenizer, "encode", noted)
    monkeypatch.setattr(asyncio, "to_thread", counted)
    assert (await complete(http, "you and the")).status_code == 200
    assert (len(trips), seen) == (1, [1])


async def test_a_client_that_leaves_while_its_request_is_prepared(
    http: httpx.AsyncClient, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tiny_engine.tokenizer.encode
    begun, go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **kwargs: Any) -> list[int]:
        begun.set()
        assert go_on.wait(30)
        return encode(*args, **kwargs)

    monkeypatch.setattr(tiny_engine.tokenizer, "encode", slow)
    before = tiny_engine.registry.entry("task").requests
    asked = asyncio.ensure_future(complete(http, ["you", "and"]))
    assert await asyncio.to_thread(begun.wait, 30)
    assert held(tiny_engine) == 1
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    go_on.set()
    async with asyncio.timeout(10):
        while tiny_engine.registry.entry("task").requests != before + 2:
            await asyncio.sleep(0.01)
    await until_nothing_is_held(tiny_engine)
    assert tiny_engine.stats().waiting == 0


@pytest.mark.parametrize("wrong", [[320], [5] * MAX_LENGTH, []])
async def test_a_later_prompt_that_is_refused(
    http: httpx.AsyncClient, tiny_engine: Engine, wrong: list[int]
) -> None:
    before = tiny_engine.registry.entry("task").requests
    response = await complete(http, [[5], wrong] if wrong else ["you", ""])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert held(tiny_engine) == 0
    assert tiny_engine.registry.entry("task").requests == before  # none of it was begun


async def test_a_later_prompt_that_the_queue_does_not_take(
    http: httpx.AsyncClient, tiny_engine: Engine
) -> None:
    response = await complete(http, [[5]] * 50, max_tokens=100, ignore_eos=True)
    assert response.status_code == 503
    await until_nothing_is_held(tiny_engine)
