"""Pages of the listing, files that are handed out, and the way back to an older version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reft_runtime.interventions import Registry
from server.app import create_app
from server.context import MAX_DOWNLOADS
from server.download import PART_BYTES
from server.settings import Settings
from tests.http.fake_engine import FakeEngine
from tests.interventions.make import BASE, digest, file_bytes, place

ONE, TWO, THREE = (file_bytes(seed, description=f"Number {seed}") for seed in (1, 2, 3))
PATH = "/v1/interventions/a"


@pytest.fixture(params=["memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    folder = tmp_path / "source"
    folder.mkdir()
    place(folder, "f", ONE)
    state = tmp_path / "state" if request.param == "disk" else None
    registry = Registry(BASE, [folder], state_dir=state)
    for data in (ONE, TWO, THREE):
        registry.put("a", data)
    registry.put("b", TWO)
    yield registry
    registry.close()


@pytest.fixture
def engine(registry: Registry) -> FakeEngine:
    engine = FakeEngine()
    engine.registry = registry
    return engine


# Pages


async def test_pages(client: httpx.AsyncClient) -> None:
    whole = (await client.get("/v1/interventions")).json()["data"]
    body = (await client.get("/v1/interventions", params={"limit": 2})).json()
    assert body == {
        "object": "list", "data": whole[:2], "total": 3, "next": "b", "problems": {},
    }  # fmt: skip
    body = (await client.get("/v1/interventions?limit=2&after=b")).json()
    assert (body["data"], body["total"], body["next"]) == (whole[2:], 3, None)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("q=NUMBER%201", ["f"]),
        ("q=number", ["a", "b", "f"]),
        ("q=", ["a", "b", "f"]),
        ("q=nobody", []),
        ("sort=-name", ["f", "b", "a"]),
        ("sort=requests", ["a", "f", "b"]),
        ("q=number&sort=-requests&limit=1", ["b"]),
    ],
)
async def test_search_and_order(
    client: httpx.AsyncClient, registry: Registry, query: str, names: list[str]
) -> None:
    version = registry.resolve("b")
    registry.hold(version)
    registry.release(version)
    body = (await client.get(f"/v1/interventions?{query}")).json()
    assert [entry["id"] for entry in body["data"]] == names


async def test_what_the_page_shows_of_a_file(client: httpx.AsyncClient) -> None:
    entry = (await client.get("/v1/interventions?q=number%203")).json()["data"][0]
    shown = {key: entry[key] for key in ("kinds", "positions", "layers", "parameters", "share")}
    parameters = 16 * 3 * 2 + 3
    assert shown == {
        "kinds": ["loreft"],
        "positions": ["l1"],
        "layers": [1],
        "parameters": parameters,
        "share": parameters / 1000,
    }
    assert entry["manifest"]["description"] == "Number 3"
    assert entry["modified"] > 1e9


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("limit=0", "limit", "limit: input should be greater than or equal to 1"),
        ("limit=1001", "limit", "less than or equal to 1000"),
        ("limit=ten", "limit", "valid integer"),
        ("sort=age", "sort", "'-last_used'"),
        ("sort=size&after=a", "after", "after: give what `next` of the page before said"),
        (f"after={'x' * 129}", "after", "at most 128"),
        (f"q={'x' * 101}", "q", "at most 100"),
        ("page=2", "page", "takes no query parameter 'page'; leave it out, or give one of limit"),
        ("limit=1&limit=2", "limit", "more than once"),
    ],
)
async def test_parameters_that_are_none(
    client: httpx.AsyncClient, query: str, param: str, words: str
) -> None:
    response = await client.get(f"/v1/interventions?{query}")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


async def test_pages_share_the_room_for_bodies(app: Any, client: httpx.AsyncClient) -> None:
    bodies = app.state.context.bodies
    assert (await client.get("/v1/interventions?limit=2")).status_code == 200
    assert bodies.held == 0
    bodies.limit = 100
    for path in ("/v1/interventions?limit=2", f"{PATH}/file"):
        response = await client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert bodies.held == 0


# Files


@pytest.mark.parametrize("registry", ["memory", "disk"], indirect=True)
async def test_files(client: httpx.AsyncClient, registry: Registry) -> None:
    for ref, data in (("a", THREE), (f"a@{digest(ONE)[:8]}", ONE), ("f", ONE)):
        response = await client.get(f"/v1/interventions/{ref}/file")
        assert response.content == data
        name = ref.partition("@")[0]
        headers = response.headers
        assert headers["content-disposition"] == f'attachment; filename="{name}.safetensors"'
        assert headers["content-type"] == "application/octet-stream"
        assert headers["content-length"] == str(len(data))
        assert headers["etag"] == f'"{digest(data)}"'
    again = await client.put("/v1/interventions/c", content=response.content)
    assert again.headers["etag"] == response.headers["etag"]
    for ref, words in (("nobody", "does not exist"), ("a@00000000", "there are")):
        response = await client.get(f"/v1/interventions/{ref}/file")
        assert response.status_code == 404
        assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_slow_reader_holds_a_part(
    app: Any, client: httpx.AsyncClient, tmp_path: Path, leaves: bool
) -> None:
    """What is sent is read when it is wanted; whoever leaves frees its place."""
    (tmp_path / "large").write_bytes(bytes(3 * PART_BYTES))
    version = app.state.context.engine.registry.resolve("f")
    version.size_bytes = 3 * PART_BYTES
    file = (tmp_path / "large").open("rb")
    app.state.context.engine.registry.open = lambda ref: (version, file)
    go, asked, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])
            asked.set()
            await go.wait()

    scope = {
        "type": "http", "method": "GET", "path": f"{PATH}/file", "headers": [],
        "query_string": b"", "asgi": {"spec_version": "2.3"},
    }  # fmt: skip
    task = asyncio.ensure_future(app(scope, receive, send))
    await asyncio.wait_for(asked.wait(), 10)
    assert file.tell() == PART_BYTES
    assert app.state.context.bodies.held == PART_BYTES
    (gone if leaves else go).set()
    await asyncio.wait_for(task, 10)
    assert len(b"".join(sent)) == (PART_BYTES if leaves else 3 * PART_BYTES)
    assert file.closed
    assert app.state.context.bodies.held == 0


async def test_files_that_are_sent_at_once_are_bounded(app: Any, client: httpx.AsyncClient) -> None:
    places = app.state.context.downloads
    for _ in range(MAX_DOWNLOADS):
        await places.acquire()
    response = await client.get(f"{PATH}/file")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert "retry-after" in response.headers
    places.release()
    assert (await client.get(f"{PATH}/file")).status_code == 200


# Versions


async def test_versions(client: httpx.AsyncClient) -> None:
    body = (await client.get(f"{PATH}/versions")).json()
    assert [version["digest"] for version in body["data"]] == [digest(d) for d in (THREE, TWO, ONE)]
    first = body["data"][0]
    assert first["modified"] > 1e9
    assert {**first, "modified": 0} == {
        "object": "intervention.version",
        "digest": digest(THREE),
        "origin": "uploaded",
        "size_bytes": len(THREE),
        "modified": 0,
        "in_flight": 0,
        "current": True,
        "kept": True,
    }
    assert (await client.get("/v1/interventions/nobody/versions")).status_code == 404


async def test_rollback(client: httpx.AsyncClient) -> None:
    for body, data in (
        ({}, TWO),
        ({"digest": None}, THREE),
        ({"digest": digest(ONE)}, ONE),
        ({"digest": digest(TWO)[:8]}, TWO),
    ):
        response = await client.post(f"{PATH}/rollback", json=body)
        assert response.status_code == 200, response.text
        assert response.headers["etag"] == f'"{digest(data)}"'
        assert response.json() == (await client.get(PATH)).json()
    response = await client.post(f"{PATH}/rollback")  # no body at all
    assert response.json()["digest"] == digest(ONE)
    assert (
        'reft:intervention_loads_total{intervention="a"} 5.0' in (await client.get("/metrics")).text
    )


async def test_rollback_only_from_a_version(client: httpx.AsyncClient) -> None:
    tag = f'"{digest(TWO)}"'
    response = await client.post(f"{PATH}/rollback", headers={"if-match": tag})
    assert (response.status_code, response.json()["error"]["code"]) == (412, "precondition_failed")
    tag = f'"{digest(THREE)}"'
    assert (await client.post(f"{PATH}/rollback", headers={"if-match": tag})).status_code == 200


@pytest.mark.parametrize(
    ("name", "body", "status", "param"),
    [
        ("nobody", {}, 404, "name"),
        ("b", {}, 404, "digest"),
        ("a", {"digest": "0" * 64}, 404, "digest"),
        ("f", {}, 400, "name"),
        ("a", {"digest": "abc"}, 400, "digest"),
        ("a", {"digset": "abc"}, 400, "digset"),
    ],
)
async def test_rollbacks_that_are_none(
    client: httpx.AsyncClient, name: str, body: dict[str, str], status: int, param: str
) -> None:
    response = await client.post(f"/v1/interventions/{name}/rollback", json=body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param
    assert (await client.get(PATH)).json()["digest"] == digest(THREE)


def test_the_description_has_the_parameters() -> None:
    document = create_app(FakeEngine(), Settings()).openapi()
    parameters = document["paths"]["/v1/interventions"]["get"]["parameters"]
    assert {parameter["name"] for parameter in parameters} == {"limit", "after", "q", "sort"}
