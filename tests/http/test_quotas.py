"""Quotas under HTTP: what passes, what is refused with which headers, and what is given back."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fakeredis import TcpFakeServer
from fastapi import FastAPI
from pydantic import SecretStr

from reft_runtime.errors import ConfigError
from server.app import create_app
from server.context import Context
from server.settings import Settings, load_settings
from server.tenants import quota
from server.tenants.quota import MINUTE, Quotas, Refused, TooLarge
from server.tenants.tenant import Tenant
from tests.helpers.serving import client_of
from tests.http.conftest import chat, completion
from tests.http.fake_engine import FakeEngine
from tests.http.tenants import key, use_tenants

FEW = Tenant("few", requests_per_minute=3)
TOKENS = Tenant("tokens", tokens_per_minute=20)
BOTH = Tenant("both", requests_per_minute=10, tokens_per_minute=100)
ONE = Tenant("one", concurrent_requests=1)
FREE = Tenant("free")

SECOND = 15.5
"""The second of its minute at which the tests' clock stands."""


class Clock:
    """The time of quotas, which a test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000 * MINUTE + SECOND

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In `server.tenants.quota` alone: what the library keeps by the real time lasts longer."""
    clock = Clock()
    monkeypatch.setattr(quota, "time", clock)
    return clock


@pytest.fixture
def app(app: FastAPI, clock: Clock) -> FastAPI:
    use_tenants(app, FEW, TOKENS, BOTH, ONE, FREE)
    return app


async def settled(app: FastAPI) -> None:
    context: Context = app.state.context
    await context.quotas.settle()


def limits_of(response: httpx.Response, what: str) -> tuple[str | None, ...]:
    headers = response.headers
    return tuple(headers.get(f"x-ratelimit-{n}-{what}") for n in ("limit", "remaining", "reset"))


@pytest.mark.parametrize("stream", [False, True])
async def test_requests_a_minute(client: httpx.AsyncClient, clock: Clock, stream: bool) -> None:
    def ask() -> Any:
        body = completion(model="emoji", stream=stream, n=2, prompt=["Hi", "you"])
        return client.post("/v1/completions", json=body, headers=key(FEW))

    for left in (2, 1, 0):
        response = await ask()
        assert response.status_code == 200
        assert limits_of(response, "requests") == ("3", str(left), "45s")
        assert limits_of(response, "tokens") == (None, None, None)
    response = await ask()
    assert response.status_code == 429
    assert response.headers["retry-after"] == "45"
    assert limits_of(response, "requests") == ("3", "0", "45s")
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert "3 requests a minute" in error["message"]
    clock.now += 45
    assert (await ask()).status_code == 200


async def test_a_refused_request_costs_nothing(client: httpx.AsyncClient, app: FastAPI) -> None:
    """What was refused does not count against a limit that is raised in the same minute."""
    for number in range(9):
        response = await client.post("/v1/completions", json=completion(), headers=key(FEW))
        assert response.status_code == (200 if number < 3 else 429)
    use_tenants(app, dataclasses.replace(FEW, requests_per_minute=5))
    for left in (1, 0):
        response = await client.post("/v1/completions", json=completion(), headers=key(FEW))
        assert response.status_code == 200
        assert limits_of(response, "requests") == ("5", str(left), "45s")


async def test_refusals_have_the_headers_of_both_limits(client: httpx.AsyncClient) -> None:
    async def ask(tokens: int) -> httpx.Response:
        body = completion(prompt="x" * tokens, max_tokens=1)
        return await client.post("/v1/completions", json=body, headers=key(BOTH))

    assert (await ask(80)).status_code == 200
    response = await ask(90)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "tokens")
    assert limits_of(response, "requests") == ("10", "9", "45s")
    assert limits_of(response, "tokens") == ("100", "19", "45s")
    for _ in range(9):
        assert (await ask(1)).status_code == 200
    response = await ask(1)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "requests")
    assert limits_of(response, "requests") == ("10", "0", "45s")
    assert limits_of(response, "tokens") == ("100", "1", "45s")


async def test_all_generating_routes_count_and_no_others(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for _ in range(5):
        for path in ("/tokenize", "/detokenize"):
            body = {"model": "tiny", "prompt": "Hi"} if path == "/tokenize" else {"tokens": [65]}
            assert (await client.post(path, json=body, headers=key(FEW))).status_code == 200
        assert (await client.get("/v1/models", headers=key(FEW))).status_code == 200
    for number, (path, body) in enumerate(
        (
            ("/v1/chat/completions", chat()),
            ("/v1/responses", {"model": "tiny", "input": "Hi"}),
            ("/v1/classify", {"model": "tiny", "input": "Hi", "labels": ["a", "b"]}),
            ("/v1/completions", completion()),
        )
    ):
        response = await client.post(path, json=body, headers=key(FEW))
        assert response.status_code == (200 if number < 3 else 429), response.text
        if number < 3:
            assert response.headers["x-ratelimit-remaining-requests"] == str(2 - number)


async def test_what_the_body_has_wrong_comes_first_and_costs_nothing(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for fields, status in (
        ({"model": "nobody"}, 404),
        ({"max_tokens": -1}, 400),
        ({"prompt": "x" * 200}, 400),
    ):
        for _ in range(4):
            body = completion(**fields)
            response = await client.post("/v1/completions", json=body, headers=key(FEW))
            assert response.status_code == status
    response = await client.post("/v1/completions", json=completion(), headers=key(FEW))
    assert limits_of(response, "requests") == ("3", "2", "45s")


async def test_tokens_a_minute(client: httpx.AsyncClient, clock: Clock) -> None:
    async def ask(prompt: str, tokens: int) -> httpx.Response:
        body = completion(prompt=prompt, max_tokens=tokens)
        return await client.post("/v1/completions", json=body, headers=key(TOKENS))

    response = await ask("x" * 6, 4)
    assert limits_of(response, "tokens") == ("20", "14", "45s")
    assert limits_of(response, "requests") == (None, None, None)
    assert limits_of(await ask("x" * 5, 2), "tokens") == ("20", "5", "45s")  # 10 + 5 of 20
    response = await ask("x" * 4, 1)  # 17 are used
    assert response.status_code == 429
    assert limits_of(response, "tokens") == ("20", "3", "45s")
    assert response.headers["retry-after"] == "45"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("tokens", "rate_limit_exceeded")
    assert (await ask("x" * 2, 1)).status_code == 200
    assert (await ask("x", 1)).status_code == 429
    clock.now += 44
    assert (await ask("x", 1)).headers["retry-after"] == "1"
    clock.now += 1
    assert (await ask("x" * 20, 1)).status_code == 200


async def test_tokens_over_the_limit_delay_the_next_requests(
    client: httpx.AsyncClient, app: FastAPI, clock: Clock
) -> None:
    async def ask(tokens: int, prompt: str = "Hi") -> httpx.Response:
        body = completion(prompt=prompt, max_tokens=tokens, ignore_eos=True)
        return await client.post("/v1/completions", json=body, headers=key(TOKENS))

    assert (await ask(68)).status_code == 200  # 70 tokens: this minute, two more, and 10
    await settled(app)
    response = await ask(1)
    assert response.status_code == 429
    assert response.headers["retry-after"] == str(45 + 2 * MINUTE)
    assert limits_of(response, "tokens") == ("20", "0", "2m45s")
    assert (await ask(1, "x" * 11)).headers["retry-after"] == str(45 + 3 * MINUTE)
    clock.now += 45 + MINUTE
    assert (await ask(1)).status_code == 429
    clock.now += MINUTE
    assert limits_of(await ask(1), "tokens") == ("20", "8", "1m0s")


async def test_a_prompt_that_no_minute_has_room_for(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    body = completion(prompt=["x" * 11, "y" * 10])
    response = await client.post("/v1/completions", json=body, headers=key(TOKENS))
    assert response.status_code == 400
    assert "retry-after" not in response.headers
    error = response.json()["error"]
    assert error["code"] == "rate_limit_exceeded"
    assert "21 tokens" in error["message"]
    assert "20 a minute" in error["message"]


@pytest.mark.parametrize("fault", ["overloaded", "failing", "leaving"])
async def test_a_request_without_a_token_costs_none(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, fault: str
) -> None:
    engine.overloaded = fault == "overloaded"
    engine.fail_after = 0 if fault == "failing" else None
    engine.step_seconds = 60 if fault == "leaving" else 0
    for stream in (False, True):
        asking = client.post(
            "/v1/completions", json=completion(prompt="x" * 20, stream=stream), headers=key(TOKENS)
        )
        if fault == "leaving":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asking, 0.05)
        else:
            assert (await asking).status_code in (500, 503)
    engine.overloaded, engine.fail_after, engine.step_seconds = False, None, 0
    response = await client.post(
        "/v1/completions", json=completion(prompt="x" * 20), headers=key(TOKENS)
    )
    assert response.status_code == 200
    assert limits_of(response, "tokens") == ("20", "0", "45s")


async def test_of_several_prompts_those_without_a_token_cost_none(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine
) -> None:
    """The second prompt fails at its first step, when the first has begun."""
    begun = 0
    real = FakeEngine.start

    def start(prepared: Any) -> Any:
        nonlocal begun
        begun += 1
        stream = real(engine, prepared)
        if begun == 2:
            stream.engine = FakeEngine(fail_after=0, step_seconds=0.05)
        return stream

    engine.start = start  # type: ignore[method-assign]
    body = completion(prompt=["x" * 5, "y" * 9], max_tokens=50)
    response = await client.post("/v1/completions", json=body, headers=key(BOTH))
    assert response.status_code == 500
    context: Context = app.state.context
    await context.quotas.settle()
    engine.start = real.__get__(engine)  # type: ignore[method-assign]
    response = await client.post("/v1/completions", json=completion(prompt="z"), headers=key(BOTH))
    left = int(response.headers["x-ratelimit-remaining-tokens"])
    assert 100 - 1 - 5 - 50 <= left <= 100 - 1 - 5  # what the first prompt had made by then


@pytest.mark.parametrize("end", ["whole", "leaves", "fails", "refused"])
async def test_requests_at_the_same_time(
    client: httpx.AsyncClient, app: FastAPI, engine: FakeEngine, end: str
) -> None:
    engine.step_seconds = 0.02
    engine.fail_after = 3 if end == "fails" else None

    async def ask(stream: bool = True) -> httpx.Response:
        body = completion(stream=stream, max_tokens=10)
        return await client.post("/v1/completions", json=body, headers=key(ONE))

    first = asyncio.ensure_future(ask())
    while not engine.running:
        await asyncio.sleep(0.001)
    second = await ask()
    assert second.status_code == 429
    assert second.headers["retry-after"] == "1"
    error = second.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert (await client.post("/v1/completions", json=completion())).status_code in (200, 500)
    if end == "leaves":
        first.cancel()
        await asyncio.wait([first])
    else:
        assert (await first).status_code == 200
    if end == "refused":
        engine.overloaded = True
        assert (await ask()).status_code == 503
        engine.overloaded = False
    engine.fail_after = None
    assert (await ask(stream=False)).status_code == 200
    context: Context = app.state.context
    assert not context.quotas._running


async def test_metrics_count_what_is_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for _ in range(5):
        await client.post("/v1/completions", json=completion(), headers=key(FEW))
    for prompt in ("x" * 15, "x" * 15, "x" * 21):
        body = completion(prompt=prompt, max_tokens=1)
        await client.post("/v1/completions", json=body, headers=key(TOKENS))
    engine.overloaded = True
    await client.post("/v1/completions", json=completion(), headers=key(FREE))
    text = (await client.get("/metrics")).text
    for line in (
        'reft:requests_rejected_total{reason="requests",tenant="few"} 2.0',
        'reft:requests_rejected_total{reason="tokens",tenant="tokens"} 1.0',
        'reft:requests_rejected_total{reason="too_large",tenant="tokens"} 1.0',
        'reft:requests_rejected_total{reason="overloaded",tenant="free"} 1.0',
        'reft:tenant_requests_total{tenant="few"} 3.0',
        'reft:tenant_prompt_tokens_total{tenant="tokens"} 15.0',
        'reft:tenant_cached_tokens_total{tenant="tokens"} 7.0',
        'reft:tenant_generation_tokens_total{tenant="tokens"} 1.0',
    ):
        assert f"{line}\n" in text


@pytest.fixture
def redis() -> Iterator[TcpFakeServer]:
    server = TcpFakeServer(("127.0.0.1", 0), server_type="redis")
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url_of(redis: TcpFakeServer) -> str:
    return f"redis://127.0.0.1:{redis.server_address[1]}/0"


async def test_servers_that_share_a_counter(redis: TcpFakeServer, clock: Clock) -> None:
    settings = Settings(quota_url=SecretStr(url_of(redis)))
    apps = [create_app(FakeEngine(), settings) for _ in range(2)]
    for app in apps:
        use_tenants(app, BOTH)
    async with client_of(apps[0]) as one, client_of(apps[1]) as two:
        body = completion(prompt="x" * 40, max_tokens=30)
        response = await one.post("/v1/completions", json=body, headers=key(BOTH))
        assert limits_of(response, "requests") == ("10", "9", "45s")
        await settled(apps[0])
        body = completion(prompt="x" * 20, max_tokens=1)
        response = await two.post("/v1/completions", json=body, headers=key(BOTH))
        assert limits_of(response, "requests") == ("10", "8", "45s")
        assert limits_of(response, "tokens") == ("100", "10", "45s")
        assert (await one.post("/v1/completions", json=body, headers=key(BOTH))).status_code == 429


async def test_a_shared_counter_that_is_away(
    clock: Clock, caplog: pytest.LogCaptureFixture, redis: TcpFakeServer
) -> None:
    url = "redis://:sesame@127.0.0.1:9/0"
    app = create_app(FakeEngine(), Settings(quota_url=SecretStr(url)))
    use_tenants(app, ONE, Tenant("few", requests_per_minute=1))
    async with client_of(app) as client:
        for _ in range(3):
            response = await client.post("/v1/completions", json=completion(), headers=key(FEW))
            assert response.status_code == 200
            assert "x-ratelimit-limit-requests" not in response.headers
        ready = await client.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["problems"] == ["the shared counter of quotas is away: no quota holds"]
        quotas = app.state.context.quotas
        other = Quotas(url_of(redis))  # of a server that has seen that it is back
        other.leave(await other.admit(Tenant("few", requests_per_minute=1), 1), 0)
        await other.close()
        quotas._storage = quotas._shared(url_of(redis))
        clock.now += quota.AWAY_SECONDS
        asked: list[None] = []

        async def ask() -> None:
            asked.append(None)
            await asyncio.sleep(0)
            raise OSError

        await asyncio.gather(quotas._ask(ask), quotas._ask(ask))
        assert asked == [None]  # the other request has not waited
        clock.now += quota.AWAY_SECONDS
        for _ in range(2):
            response = await client.post("/v1/completions", json=completion(), headers=key(FEW))
            assert response.status_code == 429
        assert "problems" not in (await client.get("/readyz")).json()
    assert caplog.text.count("does not answer") == 1
    assert caplog.text.count("answers again") == 1
    assert "sesame" not in caplog.text


async def test_a_shared_counter_that_hangs(caplog: pytest.LogCaptureFixture) -> None:
    async def hang() -> None:
        raise TimeoutError

    await Quotas("redis://127.0.0.1:9/0")._ask(hang)
    assert "does not answer (too late): no quota holds" in caplog.text


async def test_what_is_made_while_the_counter_is_away_is_never_counted(
    clock: Clock, redis: TcpFakeServer
) -> None:
    tenants = [Tenant(name, tokens_per_minute=100) for name in "ab"]
    quotas = Quotas("redis://127.0.0.1:9/0")
    away = [await quotas.admit(tenant, 1) for tenant in tenants]
    assert quotas.problem is not None
    for tenant in tenants:
        quotas.spend(tenant, 500)
    quotas._storage = quotas._shared(url_of(redis))
    clock.now += quota.AWAY_SECONDS
    for tenant in tenants:
        admitted = await quotas.admit(tenant, 1)
        assert admitted.headers["x-ratelimit-remaining-tokens"] == "99"
        quotas.leave(admitted, 0)
    for admitted in away:
        quotas.leave(admitted, 1)
    await quotas.close()


async def test_tokens_of_a_running_answer_count_while_it_runs(clock: Clock) -> None:
    quotas = Quotas()
    admitted = await quotas.admit(TOKENS, 2)
    quotas.spend(TOKENS, 18)
    with pytest.raises(Refused):
        await quotas.admit(TOKENS, 1)
    with pytest.raises(TooLarge):
        await quotas.admit(TOKENS, 21)
    clock.now += MINUTE
    quotas.spend(TOKENS, 5)
    again = await quotas.admit(TOKENS, 1)
    assert again.headers["x-ratelimit-remaining-tokens"] == "14"
    for one in (admitted, again):
        quotas.leave(one, 0)


@pytest.mark.parametrize(
    "value",
    [
        "localhost:6379",
        "http://a",
        "redis://",
        "redis://a/b c",
        "redis://:SE#CRET@a:6379/0",
        "redis://:SE?CRET@a:6379/0",
        "redis://:SECRET@a:port/0",
        "redis://:SECRET@[a:6379/0",
        "redis://:SECRET@",
        "redis://:SECRET@a:0/0",
    ],
)
def test_urls_of_counters(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--quota-url .*redis://HOST:PORT/DB") as refused:
        load_settings({"quota_url": value})
    assert "SE" not in refused.value.message
