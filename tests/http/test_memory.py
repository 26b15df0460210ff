"""Memory of interventions: requests that wait for it, pins, and uploads that take none."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from reft_runtime.interventions import Registry
from server import body
from server.settings import Settings
from server.tenants.tenant import Tenant
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine
from tests.http.tenants import key, use_tenants
from tests.interventions.make import BASE, damaged, edit_bytes, file_bytes, place

FILES = {name: file_bytes(seed) for seed, name in enumerate("abc")}


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Room for one of three files, and for one request that waits beside 40."""
    (tmp_path / "source").mkdir()
    for name, data in FILES.items():
        place(tmp_path / "source", name, data)
    one = edit_bytes(FILES["a"])
    registry = Registry(
        BASE, [tmp_path / "source"], tmp_path / "state", memory_bytes=one, max_waiting=41
    )
    yield registry
    registry.close()


@pytest.fixture
def engine(registry: Registry) -> FakeEngine:
    engine = FakeEngine()
    engine.registry = registry
    return engine


async def ask(client: httpx.AsyncClient, model: str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json=completion(model=model, **fields))


async def until(registry: Registry, waiting: int) -> None:
    async with asyncio.timeout(20):
        while registry.waiting() != waiting:
            await asyncio.sleep(0.005)


@pytest.fixture
async def full(registry: Registry) -> AsyncIterator[None]:
    """A request that fills the memory, until a test lets go of it or ends."""
    holding = registry.acquire(["a"])
    await asyncio.to_thread(holding.ready.result)
    yield
    holding.release()
    assert registry.waiting() == 0
    async with asyncio.timeout(20):
        while any(entry.in_flight for entry in registry.entries()):
            await asyncio.sleep(0.005)


async def test_a_request_waits_for_its_turn(
    client: httpx.AsyncClient, engine: FakeEngine, registry: Registry
) -> None:
    engine.step_seconds = 0.01
    answers = await asyncio.gather(*(ask(client, name, max_tokens=3) for name in "abcabc"))
    assert {answer.status_code for answer in answers} == {200}
    assert [entry.requests for entry in registry.entries()] == [2, 2, 2]


async def test_who_waits_takes_no_thread_and_who_leaves_waits_no_longer(
    client: httpx.AsyncClient, registry: Registry, full: None
) -> None:
    waiting = [asyncio.ensure_future(ask(client, "b")) for _ in range(40)]
    await until(registry, 40)
    assert (await asyncio.wait_for(ask(client, "tiny"), 20)).status_code == 200
    stats = (await client.get("/v1/stats")).json()
    assert stats["interventions"]["waiting"] == 40
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    await until(registry, 0)


async def test_too_many_that_wait(
    client: httpx.AsyncClient, registry: Registry, full: None
) -> None:
    waiting = [asyncio.ensure_future(ask(client, "b")) for _ in range(41)]
    await until(registry, 41)
    answer = await ask(client, "c")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert "41 requests wait for memory" in answer.json()["error"]["message"]
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


@pytest.mark.parametrize("settings", [Settings(first_token_timeout=0.1)])
@pytest.mark.parametrize("kind", ["completions", "classify"])
async def test_waiting_ends_when_the_first_token_is_late(
    client: httpx.AsyncClient, full: None, kind: str
) -> None:
    if kind == "classify":
        body = {"model": "b", "input": "Hi", "labels": ["x", "y"]}
        answer = await client.post("/v1/classify", json=body)
    else:
        answer = await ask(client, "b")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
    assert answer.json()["error"]["message"] == "No first token within 0.1 seconds."


async def test_more_than_there_may_be_is_refused(client: httpx.AsyncClient) -> None:
    uses = [{"name": "a"}, {"name": "b"}]
    answer = await ask(client, "tiny", interventions=uses)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "interventions"
    assert "--intervention-bytes" in answer.json()["error"]["message"]


async def test_counting_tokens_needs_no_memory(client: httpx.AsyncClient, full: None) -> None:
    answer = await client.post("/tokenize", json={"model": "b", "prompt": "Hi"})
    assert answer.json()["count"] == 2


async def test_pin_unpin_and_warm(client: httpx.AsyncClient) -> None:
    async def post(name: str, change: str) -> httpx.Response:
        return await client.post(f"/v1/interventions/{name}/{change}")

    warm = (await post("a", "warm")).json()
    assert (warm["id"], warm["tier"], warm["pinned"]) == ("a", "host", False)
    pinned = await post("b", "pin")
    assert (pinned.json()["tier"], pinned.json()["pinned"]) == ("host", True)
    assert pinned.headers["etag"] == f'"{pinned.json()["digest"]}"'
    full = await post("c", "pin")
    assert (full.status_code, full.json()["error"]["code"]) == (507, "store_full")
    kept_out = await ask(client, "a")
    assert (kept_out.status_code, kept_out.json()["error"]["code"]) == (503, "unavailable")
    listed = (await client.get("/v1/interventions")).json()["data"]
    assert [entry["pinned"] for entry in listed] == [False, True, False]
    assert not (await post("b", "unpin")).json()["pinned"]
    assert (await ask(client, "a")).status_code == 200
    for change in ("pin", "unpin", "warm"):
        assert (await post("x", change)).status_code == 404


async def test_users_leave_room_for_others(
    client: httpx.AsyncClient, app: FastAPI, registry: Registry
) -> None:
    """Whatever a tenant uploads and pins: else it could take all memory, for good."""
    team, ops = Tenant("team-a", upload=True), Tenant("ops", "admin")
    use_tenants(app, team, ops)
    memory, size = registry._catalog.memory, edit_bytes(FILES["a"])
    memory.budget = 10**6
    registry.put("team-a.small", FILES["b"])
    entry = memory.fixed
    registry.put("team-a.small", FILES["c"])
    memory.budget = 2 * (3 * entry + size) + size  # half has room for three entries and one pin

    async def status(who: Tenant, method: str, path: str, **given: Any) -> int:
        url = f"/v1/interventions/team-a.{path}"
        return (await client.request(method, url, headers=key(who), **given)).status_code

    assert await status(team, "POST", "small/pin") == 200
    assert await status(team, "PUT", "other", content=FILES["b"]) == 201
    assert await status(team, "POST", "other/pin") == 507
    assert await status(team, "POST", "small/rollback") == 200
    large = file_bytes(7, description="x" * 4000)
    assert await status(team, "PUT", "large", content=large) == 507
    assert (await ask(client, "a")).status_code == 200
    assert await status(ops, "POST", "other/pin") == 200
    assert await status(team, "POST", "small/rollback") == 507


# Uploads


def under_way(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "state" / "incoming").iterdir())


@pytest.fixture
def roomy(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry._catalog.memory, "budget", 1 << 20)


async def parts(data: bytes, tmp_path: Path) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 500):
        yield data[start : start + 500]
        await asyncio.sleep(0)
    assert len(under_way(tmp_path)) == 1  # on the disk, as far as it was received


async def test_an_upload_is_written_as_it_comes(
    client: httpx.AsyncClient, tmp_path: Path, roomy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "FILE_PART_BYTES", 700)
    data = FILES["c"]
    headers = {"x-sha256": hashlib.sha256(data).hexdigest()}
    answer = await client.put("/v1/interventions/u", content=parts(data, tmp_path), headers=headers)
    assert answer.status_code == 201
    assert (await client.get("/v1/interventions/u/file")).content == data
    for bad, why in ((damaged(data), "damaged"), (data[:600], "Cut off"), (b"", "empty")):
        answer = await client.put("/v1/interventions/u", content=parts(bad, tmp_path))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_file")
        assert why in answer.json()["error"]["message"]
    answer = await client.put("/v1/interventions/u", content=FILES["a"], headers=headers)
    assert "SHA-256" in answer.json()["error"]["message"]
    assert under_way(tmp_path) == []


async def test_an_upload_that_is_broken_off_leaves_nothing(
    client: httpx.AsyncClient, tmp_path: Path, roomy: None
) -> None:
    begun = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield b"x"
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(client.put("/v1/interventions/u", content=endless()))
    await begun.wait()
    async with asyncio.timeout(20):
        while not under_way(tmp_path):
            await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.wait([task])
    assert under_way(tmp_path) == []
    assert (await client.get("/v1/interventions/u")).status_code == 404


async def test_a_disk_without_room_for_uploads(
    client: httpx.AsyncClient, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Registry(BASE)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no/such/place")
    try:
        with pytest.raises(Exception, match="--state-dir"):
            other.put("u", FILES["a"])
    finally:
        other.close()
