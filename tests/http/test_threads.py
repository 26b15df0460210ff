"""Threads in which requests are read and prepared: nobody keeps others out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from server.context import TENANT_THREADS
from server.settings import Settings
from server.tenants.tenant import Tenant
from server.threads import THREADS
from tests.http.fake_engine import FakeEngine
from tests.http.tenants import key, use_tenants


@pytest.fixture
def settings() -> Settings:
    return Settings(api_key=SecretStr("sesame"))


@pytest.mark.parametrize("leave", [False, True])
async def test_a_tenant_has_a_part_of_the_threads(
    client: httpx.AsyncClient,
    app: FastAPI,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    leave: bool,
) -> None:
    """However many slow requests it sends, and also if it does not wait for their answers."""
    team, other = Tenant("team-a"), Tenant("team-b")
    use_tenants(app, team, other)
    decode, end = engine.tokenizer.decode, threading.Event()
    begun = [threading.Event() for _ in range(2 * THREADS)]

    def slow(ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if ids[0] < len(begun):
            begun[ids[0]].set()
            assert end.wait(60)
        return decode(ids)

    monkeypatch.setattr(engine.tokenizer, "decode", slow)

    async def ask(who: Tenant, token: int) -> int:
        body = {"tokens": [token]}
        return (await client.post("/detokenize", json=body, headers=key(who))).status_code

    asked = [asyncio.ensure_future(ask(team, token)) for token in range(len(begun))]
    try:
        for event in begun[:TENANT_THREADS]:
            assert await asyncio.to_thread(event.wait, 30)
        if leave:
            for task in asked[:TENANT_THREADS]:
                task.cancel()
        async with asyncio.timeout(30):
            assert await ask(other, 100) == 200
        assert sum(event.is_set() for event in begun) == TENANT_THREADS
    finally:
        end.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert answers.count(200) == len(begun) - leave * TENANT_THREADS
