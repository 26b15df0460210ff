"""The registry behind the routes: files that change, disks that fail, bounds, listings."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reft_runtime.interventions import Registry
from reft_runtime.interventions.registry.entry import Change
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine
from tests.interventions.make import BASE, damaged, digest, file_bytes, place

ONE, TWO = file_bytes(1), file_bytes(2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    place(path, "a", ONE)
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def registry(folder: Path, state: Path) -> Iterator[Registry]:
    registry = Registry(BASE, [folder], state_dir=state)
    yield registry
    registry.close()


@pytest.fixture
def engine(registry: Registry) -> FakeEngine:
    engine = FakeEngine()
    engine.registry = registry
    return engine


async def ask(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/completions", json=completion(model=model, max_tokens=1))


async def listed(client: httpx.AsyncClient) -> dict[str, Any]:
    body = (await client.get("/v1/interventions")).json()
    return {entry["id"]: entry for entry in body["data"]}


async def test_a_replaced_file_is_served_at_once(client: httpx.AsyncClient, folder: Path) -> None:
    place(folder, "a", TWO)
    assert (await ask(client, "a")).status_code == 200
    assert (await ask(client, "a@" + digest(TWO))).status_code == 200
    place(folder, "new", ONE)
    assert (await ask(client, "new")).status_code == 200


async def test_damaged_data_is_503_and_listed(client: httpx.AsyncClient, folder: Path) -> None:
    place(folder, "b", damaged(ONE))
    place(folder, "c", b"")
    for name, reason in (("b", "damaged file"), ("c", "Cut off")):
        answer = await ask(client, name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert reason in answer.json()["error"]["message"]
    entries = await listed(client)
    assert "damaged file" in entries["b"]["problem"]
    assert entries["a"]["problem"] is None
    problems = (await client.get("/v1/interventions")).json()["problems"]
    assert list(problems) == ["c.safetensors"]
    assert "Cut off" in problems["c.safetensors"]


async def test_a_full_disk_is_507(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = await client.put("/v1/interventions/a", content=TWO)
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "store_full")
    assert "disk of the state folder is full" in answer.json()["error"]["message"]
    assert (await ask(client, "a")).status_code == 200


async def test_a_deleted_state_folder(client: httpx.AsyncClient, state: Path) -> None:
    assert (await client.put("/v1/interventions/u", content=ONE)).status_code == 201
    shutil.rmtree(state)
    assert (await client.put("/v1/interventions/v", content=TWO)).status_code == 201
    assert (await ask(client, "u")).status_code == 200
    assert "no longer kept" in (await listed(client))["u"]["problem"]
    assert (await client.delete("/v1/interventions/u")).status_code == 200
    shutil.rmtree(state)
    other = Registry(BASE, state_dir=state)
    for answer in (
        await client.put("/v1/interventions/v", content=ONE),
        await client.delete("/v1/interventions/v"),
    ):
        assert answer.status_code == 503
        assert "another server has it" in answer.json()["error"]["message"]
    assert (await ask(client, "v")).status_code == 200
    other.close()


async def test_delete_mends_a_damaged_pointer(folder: Path, state: Path, app: Any) -> None:
    (state / "pointers" / "x.json").write_bytes(b"{")
    context = app.state.context
    context.engine.registry.close()
    context.engine.registry = Registry(BASE, [folder], state_dir=state)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert "x" in (await client.get("/v1/interventions")).json()["problems"]
        assert (await client.delete("/v1/interventions/x")).status_code == 200
        assert (await client.get("/v1/interventions")).json()["problems"] == {}
        assert (await client.delete("/v1/interventions/x")).status_code == 404


async def test_the_base_models_id_is_refused(
    client: httpx.AsyncClient, registry: Registry, folder: Path
) -> None:
    place(folder, "tiny", ONE)
    registry.scan()
    models = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert models == ["tiny", "a"]
    answer = await client.put("/v1/interventions/tiny", content=ONE)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
    answer = await client.post(
        "/v1/load_lora_adapter", json={"lora_name": "tiny", "lora_path": "a.safetensors"}
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_name")
    problems = (await client.get("/v1/interventions")).json()["problems"]
    assert "the base model's own id" in problems["tiny.safetensors"]


@pytest.mark.parametrize("path", ["x" * 256, "x" * 4096, "y/" * 2000])
async def test_a_path_that_is_too_long(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.post("/v1/load_lora_adapter", json={"lora_name": "n", "lora_path": path})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "lora_path")


async def test_listings_have_many_parts(
    client: httpx.AsyncClient, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_runtime.interventions.registry.listing.PART", 2)
    names = ["a", *(f"n{number}" for number in range(7))]
    for name in names[1:]:
        registry.put(name, ONE)
    assert list(await listed(client)) == names
    models = (await client.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["tiny", *names]
    monkeypatch.setattr("reft_runtime.interventions.registry.listing.PART_BYTES", 1)
    body = (await client.get("/v1/interventions")).json()
    assert [entry["id"] for entry in body["data"]] == names
    assert body["data"][0]["manifest"]["base"]["model"] == "tiny"
    assert body["data"][0] == (await client.get("/v1/interventions/a")).json()
    for name in names[1:]:
        registry.remove(name)
    os.unlink(registry._folders._found["a"].where)
    registry.scan()
    assert (await client.get("/v1/interventions")).json()["data"] == []


async def test_an_unread_listing_is_made_no_further(
    app: Any, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reft_runtime.interventions.registry.listing.PART", 1)
    for number in range(20):
        engine.registry.put(f"n{number}", ONE)
    sent: list[bytes] = []
    blocked = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and len(sent) == 3:
            blocked.set()
            await asyncio.Event().wait()
        sent.append(message.get("body", b""))

    scope = {
        "type": "http", "method": "GET", "path": "/v1/interventions", "headers": [],
        "query_string": b"", "asgi": {"spec_version": "2.3"},
    }  # fmt: skip
    made: list[int] = []
    pages = Registry.pages

    def counted(self: Registry, sees: Callable[[str], bool]) -> Iterator[Any]:
        for page in pages(self, sees):
            made.append(1)
            yield page

    monkeypatch.setattr(Registry, "pages", counted)
    task = asyncio.ensure_future(app(scope, receive, send))
    await asyncio.wait_for(blocked.wait(), 10)
    await asyncio.sleep(0.05)
    assert len(made) < 5
    task.cancel()
    await asyncio.wait([task])


async def test_completions_do_not_wait_for_administration(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    put = Registry.put

    def slow(*args: Any, **options: Any) -> Any:
        go.wait(30)
        return put(*args, **options)

    monkeypatch.setattr(Registry, "put", slow)
    puts = [
        asyncio.ensure_future(client.put(f"/v1/interventions/p{n}", content=ONE)) for n in range(40)
    ]
    await asyncio.sleep(0.05)
    assert (await asyncio.wait_for(ask(client, "a"), 20)).status_code == 200
    go.set()
    assert {answer.status_code for answer in await asyncio.gather(*puts)} == {201}


async def test_changes_that_wait_hold_up_no_listing_and_no_metrics(
    client: httpx.AsyncClient, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    put = registry.put

    def slow(*args: Any, **options: Any) -> Change:
        go_on.wait(20)
        return put(*args, **options)

    monkeypatch.setattr(registry, "put", slow)
    uploads = [
        asyncio.create_task(client.put(f"/v1/interventions/u{i}", content=TWO)) for i in range(8)
    ]
    try:
        for path in ("/metrics", "/v1/models", "/v1/interventions", "/v1/stats", "/readyz"):
            assert (await asyncio.wait_for(client.get(path), 10)).status_code == 200
    finally:
        go_on.set()
    assert {answer.status_code for answer in await asyncio.gather(*uploads)} == {201}
