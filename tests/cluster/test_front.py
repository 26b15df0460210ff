"""A front before two replicas: routing, answers, deaths, bodies, and what is said of all."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Message

from server.cluster.affinity import key_of, names_of
from server.cluster.front import Front
from server.cluster.slots import Slot
from server.connections import Limits
from server.settings import Settings
from server.tenants.keys import new_key
from tests.cluster.local import Cluster, client_of, cluster_of, counted
from tests.http.conftest import chat, completion


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(state_dir=str(tmp_path), shared_state=True, drain_seconds=1)


@pytest.fixture
async def cluster(settings: Settings) -> AsyncIterator[Cluster]:
    async with cluster_of(settings, "one", "two") as cluster:
        yield cluster
        assert not any(engine.running for engine in cluster.engines.values())


@pytest.fixture
async def client(cluster: Cluster, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(cluster, settings) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/v1/completions", {"model": "a"}, ("a",)),
        ("/v1/completions", {"model": "a@d1d1d1d1"}, ("a",)),
        ("/v1/completions", {"model": "tiny:a"}, ("a",)),
        ("/v1/completions", {"model": "tiny"}, ()),
        ("/v1/chat/completions", {"model": "tiny", "interventions": [{"name": "a"}]}, ("a",)),
        ("/v1/chat/completions", {"interventions": [{"name": "b"}, {"name": "a"}]}, ("b", "a")),
        ("/v1/chat/completions", {"interventions": [3, {"name": 4}, {}]}, ()),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "x"}, ("a",)),
        ("/v1/interventions/a", None, ("a",)),
        ("/v1/interventions/a/rollback", {"digest": "d1"}, ("a",)),
        ("/v1/interventions", None, ()),
        ("/v1/completions", {"model": 3}, ()),
        ("/v1/completions", [1], ()),
        ("/", None, ()),
    ],
)
def test_names_in_a_request(path: str, body: Any, names: tuple[str, ...]) -> None:
    assert names_of(path, body, "tiny") == names


def test_keys() -> None:
    assert key_of(()) == ""
    assert key_of(("a",)) != key_of(("b",)) != key_of(("a", "b"))
    assert key_of(("\ud800",))  # whatever JSON can write has a key


async def test_the_same_intervention_goes_to_the_same_replica(
    cluster: Cluster, client: httpx.AsyncClient
) -> None:
    for _ in range(3):
        for model in ("pirate", "emoji", "formal"):
            assert (await client.post("/v1/completions", json=completion(model=model))).is_success
    found = {
        key: {name for name, other in cluster.asked if other == key} for _, key in cluster.asked
    }
    assert len(found) == 3
    assert all(len(names) == 1 for names in found.values())


async def test_requests_to_the_base_spread(cluster: Cluster, client: httpx.AsyncClient) -> None:
    for _ in range(4):
        await client.post("/v1/completions", json=completion())
    assert [name for name, _ in cluster.asked] == ["one", "two"] * 2


async def test_answers_are_the_servers_own(cluster: Cluster, client: httpx.AsyncClient) -> None:
    whole = await client.post("/v1/chat/completions", json=chat())
    assert whole.json()["choices"][0]["message"]["content"] == "abcd"
    streamed = await client.post("/v1/chat/completions", json=chat(stream=True))
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    wrong = await client.post("/v1/completions", json=completion(max_token=4))
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "max_token")
    broken = await client.post(
        "/v1/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400
    assert (await client.get("/nothing")).status_code == 404
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    file = await client.get("/v1/interventions/pirate/file")
    assert file.content == b"abc"
    assert (await client.get("/v1/models?x=1")).json()["error"]["param"] == "x"


async def test_pieces_come_as_they_are_made(cluster: Cluster, client: httpx.AsyncClient) -> None:
    for engine in cluster.engines.values():
        engine.step_seconds = 0.01
    body = completion(stream=True, max_tokens=20)
    await client.post("/v1/completions", json=body)
    head, *pieces = [piece async for piece in cluster.replicas["one"].answer(cluster.calls[-1])]
    assert len(pieces) >= 10
    assert head.headers  # type: ignore[union-attr]


async def test_a_client_that_leaves(cluster: Cluster, settings: Settings) -> None:
    for engine in cluster.engines.values():
        engine.step_seconds = 0.05
    content = json.dumps(completion(stream=True, max_tokens=90)).encode()
    begun, sent = asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": content, "more_body": False}
        await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            begun.set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ],
    }
    async with asyncio.timeout(10):
        await Front(cluster, settings)(scope, receive, send)
        while any(engine.running for engine in cluster.engines.values()):
            await asyncio.sleep(0.01)
    [stream] = [s for engine in cluster.engines.values() for s in engine.streams[1:]]
    assert stream.aborted


@pytest.mark.parametrize("deaths", [1, 2])
async def test_a_death_before_the_answer(
    cluster: Cluster, client: httpx.AsyncClient, deaths: int
) -> None:
    cluster.dies = [0] * deaths
    response = await client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["text"] == "abcd"
    assert len(cluster.asked) == deaths + 1


async def test_deaths_without_end(cluster: Cluster, client: httpx.AsyncClient) -> None:
    cluster.dies = [0] * 10
    response = await client.post("/v1/completions", json=completion())
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert len(cluster.asked) == 3


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/interventions/pirate"),
        ("DELETE", "/v1/interventions/pirate"),
        ("POST", "/v1/interventions/pirate/rollback"),
    ],
)
async def test_a_change_is_never_made_twice(
    cluster: Cluster, client: httpx.AsyncClient, method: str, path: str
) -> None:
    cluster.dies = [0]
    response = await client.request(method, path, content=b"")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "replica_died"
    assert "look whether" in response.json()["error"]["message"]
    assert len(cluster.asked) == 1


async def test_a_death_in_a_stream(cluster: Cluster, client: httpx.AsyncClient) -> None:
    for engine in cluster.engines.values():
        engine.step_seconds = 0.01
    cluster.dies = [2]
    response = await client.post("/v1/completions", json=completion(stream=True, max_tokens=50))
    *_, error, done, end = response.text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_died"
    assert (done, end) == ("data: [DONE]", "")
    cluster.dies = [2]
    body = {"model": "tiny", "input": "Hi", "stream": True, "max_output_tokens": 50}
    response = await client.post("/v1/responses", json=body)
    *before, last, _ = response.text.split("\n\n")
    name, _, data = last.partition("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert (error["code"], error["sequence_number"]) == ("replica_died", len(before))


async def test_a_death_in_another_answer_cuts_it_off(
    cluster: Cluster, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.download.PART_BYTES", 1)
    cluster.dies = [1]
    front = client._transport
    assert isinstance(front, httpx.ASGITransport)
    front.raise_app_exceptions = True
    with pytest.raises(Exception, match="has ended"):
        await client.get("/v1/interventions/pirate/file")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", completion()),
        ("/v1/completions", completion(stream=True)),
        ("/v1/responses", {"model": "tiny", "input": "Hi", "stream": True}),
        ("/v1/responses", {"model": "tiny", "input": "Hi", "stream": True, "max_output_tokens": 1}),
    ],
)
async def test_a_death_behind_the_whole_answer_is_none(
    cluster: Cluster, client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    """Before the replica has said that it was all, or the front has heard it."""
    assert isinstance(client._transport, httpx.ASGITransport)
    client._transport.raise_app_exceptions = True
    whole = await client.post(path, json=body)
    cluster.dies = [cluster.pieces]
    cut = await client.post(path, json=body)
    assert not cluster.dies
    assert cut.status_code == 200
    assert len(cut.content) == len(whole.content)
    assert b"replica_died" not in cut.content


@asynccontextmanager
async def streaming(
    cluster: Cluster, settings: Settings, *, step_seconds: float, tokens: int
) -> AsyncIterator[tuple[Front, httpx.AsyncClient, asyncio.Future[httpx.Response]]]:
    """A front, a client of it, and a stream that has begun."""
    for engine in cluster.engines.values():
        engine.step_seconds = step_seconds
    front = Front(cluster, settings)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(front), base_url="http://front"
    ) as client:
        body = completion(stream=True, max_tokens=tokens)
        stream = asyncio.ensure_future(client.post("/v1/completions", json=body))
        while not any(engine.running for engine in cluster.engines.values()):
            await asyncio.sleep(0)
        yield front, client, stream


async def test_a_front_that_drains(cluster: Cluster, settings: Settings) -> None:
    async with streaming(cluster, settings, step_seconds=0.01, tokens=50) as begun:
        front, client, running = begun
        draining = asyncio.ensure_future(front.drain(60))
        await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json=completion())
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert refused.headers["retry-after"]
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert (await client.get("/livez")).status_code == 200
        assert not draining.done()
        assert (await running).text.endswith("data: [DONE]\n\n")
        await draining


async def test_a_drain_ends_what_is_left(cluster: Cluster, settings: Settings) -> None:
    """A stream, and a request that waits for a replica while all start."""
    async with streaming(cluster, settings, step_seconds=0.05, tokens=90) as begun:
        front, client, stream = begun
        cluster.starts = True
        waiting = asyncio.ensure_future(client.post("/v1/completions", json=completion()))
        while front._under_way < 2:
            await asyncio.sleep(0)
        await front.drain(0.1)
        assert stream.done()
        assert waiting.done()
    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    assert answer.headers["retry-after"]
    *_, error, done, _ = (await stream).text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    assert done == "data: [DONE]"


async def test_full_and_empty(
    cluster: Cluster, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reft")
    assert (await client.get("/readyz")).json() == {"status": "ok"}
    cluster.full = True
    headers = {"x-request-id": "mine"}
    response = await client.post("/v1/completions", json=completion(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert response.headers["retry-after"]
    told = [record.getMessage() for record in caplog.records]
    assert told[-1].startswith("POST /v1/completions 503 id=mine")
    cluster.full, cluster.empty = False, True
    response = await client.post("/v1/completions", json=completion())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    response = await client.get("/readyz")
    assert (response.status_code, response.json()) == (503, {"status": "no replica answers"})


async def test_a_page_of_another_origin_sees_errors() -> None:
    settings = Settings(allowed_origins="https://a.example", drain_seconds=1)
    headers = {"origin": "https://a.example"}
    async with cluster_of(settings, "one") as cluster, client_of(cluster, settings) as client:
        for full in (False, True):
            cluster.full = full
            response = await client.post("/v1/completions", json=completion(), headers=headers)
            assert response.status_code == (503 if full else 200)
            assert response.headers.get_list("access-control-allow-origin") == [headers["origin"]]
            assert "retry-after" in response.headers["access-control-expose-headers"]


async def test_web_sockets_are_closed(cluster: Cluster, settings: Settings) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    await Front(cluster, settings)({"type": "websocket", "path": "/"}, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_bodies_within_bounds(cluster: Cluster, client: httpx.AsyncClient) -> None:
    large = completion(prompt="x" * 5 * 2**20)
    response = await client.post("/v1/completions", json=large)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert not cluster.calls
    file = bytes(9 * 2**20)

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(file), 2**16):
            yield file[at : at + 2**16]

    response = await client.put("/v1/interventions/new", content=parts())
    assert response.status_code == 201
    assert cluster.kept == [4 * 2**20, 4 * 2**20, 2**20]  # never whole in the front
    [name] = [name for name, engine in cluster.engines.items() if "new" in engine.own.versions]
    assert cluster.engines[name].own.last_put[0] == file


async def test_a_slow_body(cluster: Cluster, settings: Settings) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async with client_of(cluster, settings, Limits(0, body=0.05)) as client:
        response = await client.post("/v1/completions", content=slow())
    assert response.status_code == 408


async def test_without_a_key_nothing_is_kept(tmp_path: Path) -> None:
    settings = Settings(api_key=SecretStr("secret"), drain_seconds=1)

    async def large() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(2**17)

    async with cluster_of(settings, "one") as cluster, client_of(cluster, settings) as client:
        response = await client.put("/v1/interventions/new", content=large())
        assert response.status_code == 401
        assert not cluster.kept
        assert not cluster.calls
        headers = {"authorization": "Bearer secret"}
        response = await client.put("/v1/interventions/new", content=large(), headers=headers)
        assert response.status_code == 201
        assert cluster.kept


async def test_a_key_that_replicas_know_before_the_front(tmp_path: Path) -> None:
    settings = Settings(api_key=SecretStr("new"), drain_seconds=1)
    before = Settings(api_key=SecretStr("old"))
    headers = {"authorization": "Bearer new"}
    async with cluster_of(settings, "one") as cluster, client_of(cluster, before) as client:
        response = await client.post("/v1/completions", json=completion(), headers=headers)
        assert response.status_code == 401, response.text


async def test_a_replica_that_has_just_joined_looks_again(
    cluster: Cluster, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    for engine in cluster.engines.values():
        monkeypatch.setattr(engine.own, "catch_up", looked.append)
    uses = [{"name": "pirate"}, {"name": "emoji"}]
    await client.post("/v1/chat/completions", json=chat(interventions=uses))
    assert sorted(looked) == ["emoji", "pirate"]
    for replica in cluster.replicas.values():
        replica._joined -= 3600
    await client.post("/v1/chat/completions", json=chat(interventions=uses))
    assert len(looked) == 2


async def test_a_change_reaches_all(
    cluster: Cluster, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    for replica in cluster.replicas.values():
        replica._joined -= 3600
    for engine in cluster.engines.values():
        monkeypatch.setattr(engine.own, "catch_up", looked.append)
    response = await client.put("/v1/interventions/new", content=b"abc")
    assert looked == ["new", "new"]
    assert "x-replicas-behind" not in response.headers
    monkeypatch.delattr(cluster.engines["two"].own, "catch_up")
    monkeypatch.setattr(cluster.engines["two"].own, "catch_up", _away, raising=False)
    response = await client.put("/v1/interventions/new", content=b"abc")
    assert response.headers["x-replicas-behind"] == "two"
    cluster.hangs = True
    response = await client.put("/v1/interventions/new", content=b"abc")
    assert response.headers["x-replicas-behind"] == "a replica that does not answer"


def _away(name: str) -> None:
    from reft_runtime.errors import Unavailable

    raise Unavailable("The state is away.")


async def test_what_is_said_of_all(cluster: Cluster, client: httpx.AsyncClient) -> None:
    for _ in range(4):
        await client.post("/v1/completions", json=completion())
    metrics = (await client.get("/metrics")).text
    assert counted(metrics, "reft:request_success_total") == {"one": 2, "two": 2}
    assert "reft:replicas_silent 0.0" in metrics
    stats = (await client.get("/v1/stats")).json()
    assert (stats["replicas"], stats["max_running"], stats["finished"]["length"]) == (2, 16, 4)
    assert stats["kv_cache"] == {"usage": 0.5, "tokens": 1600, "bytes": 2_000_000}
    assert stats["interventions"]["registered"] == 3
    assert stats["prefix_cache"]["hit_rate"] == 0.5
    assert stats["status"] == "ok"
    cluster.engines["two"].heartbeat_age = 100
    assert (await client.get("/v1/stats")).json()["status"] == "engine not running"
    cluster.hangs = True
    metrics = (await client.get("/metrics")).text
    assert counted(metrics, "reft:request_success_total") == {"one": 2}
    assert "reft:replicas_silent 1.0" in metrics
    stats = (await client.get("/v1/stats")).json()
    assert (stats["replicas"], stats["finished"]["length"]) == (1, 2)
    told = "1 of the replicas did not answer in time: what they have counted is missing"
    assert stats["problems"] == [told]
    usage = (await client.get("/v1/usage")).json()
    assert (usage["total"]["requests"], usage["problem"]) == (2, told)


async def test_usage_counts_replicas_that_are_gone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = cluster_of(settings, "one", "two", "three")
    async with three as before, client_of(before, settings) as client:
        for _ in range(6):
            await client.post("/v1/completions", json=completion())
    async with cluster_of(settings, "four") as cluster, client_of(cluster, settings) as client:
        await client.post("/v1/completions", json=completion())
        # Several may ask at once: each reads what the three have left.
        answers = await asyncio.gather(*(client.get("/v1/usage") for _ in range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        usage = answers[0].json()
        assert usage["total"]["requests"] == 7
        assert [row["intervention"] for row in usage["data"]] == ["(base)"]
        monkeypatch.setattr("server.cluster.slots.HELD_SECONDS", 0.0)
        starting = Slot.take(tmp_path)  # by a replica that nobody knows yet
        assert (await client.get("/v1/usage")).status_code == 503
        starting.release()
    assert len(list((tmp_path / "replicas").iterdir())) == 3  # none for `four`: it took one over


async def test_a_tenant_is_told_its_own_usage_at_all_replicas(
    settings: Settings, tmp_path: Path
) -> None:
    keys = {name: new_key() for name in ("team-a", "team-b")}
    file = tmp_path / "keys.toml"
    file.write_text(
        "".join(
            f'[tenants.{name}]\nkeys = ["{hashed}"]\ninterventions = []\n'
            for name, (_, hashed) in keys.items()
        )
    )
    settings = settings.model_copy(update={"keys": file})
    headers = {name: {"authorization": f"Bearer {key}"} for name, (key, _) in keys.items()}
    async with (
        cluster_of(settings, "gone", "two") as cluster,
        client_of(cluster, settings) as asking,
    ):
        for name in ("team-a", "team-a", "team-b", "team-b"):
            await asking.post("/v1/completions", json=completion(), headers=headers[name])
    async with cluster_of(settings, "one") as cluster, client_of(cluster, settings) as asking:
        for name, requests in (("team-a", 3), ("team-b", 2)):
            if requests == 3:
                await asking.post("/v1/completions", json=completion(), headers=headers[name])
            usage = (await asking.get("/v1/usage", headers=headers[name])).json()
            assert [row["tenant"] for row in usage["data"]] == [name]
            assert usage["total"]["requests"] == requests
        other = await asking.get("/v1/usage?tenant=team-b", headers=headers["team-a"])
        assert other.status_code == 403
