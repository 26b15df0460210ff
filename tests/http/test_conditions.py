"""Changes that hold only for what their sender has seen, and what each task was used for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reft_runtime.interventions import Registry
from server.metrics import MAX_NAMES
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine
from tests.interventions.make import BASE, digest, file_bytes, place

ONE, TWO = file_bytes(1), file_bytes(2)
TAG_ONE, TAG_TWO = f'"{digest(ONE)}"', f'"{digest(TWO)}"'
PATH = "/v1/interventions/a"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def registry(folder: Path) -> Iterator[Registry]:
    registry = Registry(BASE, [folder])
    yield registry
    registry.close()


@pytest.fixture
def engine(registry: Registry) -> FakeEngine:
    engine = FakeEngine()
    engine.registry = registry
    return engine


async def put(client: httpx.AsyncClient, data: bytes, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return await client.put(PATH, content=data, headers=named)


def assert_changed(response: httpx.Response, *words: str) -> None:
    assert response.status_code == 412
    error = response.json()["error"]
    assert error["code"] == "precondition_failed"
    assert all(word in error["message"] for word in words)


async def test_only_a_new_name(client: httpx.AsyncClient) -> None:
    assert (await put(client, ONE, if_none_match="*")).status_code == 201
    assert_changed(await put(client, TWO, if_none_match="*"), digest(ONE), "none was to be there")
    assert (await client.get(PATH)).headers["etag"] == TAG_ONE


async def test_only_over_a_version(client: httpx.AsyncClient) -> None:
    assert_changed(await put(client, ONE, if_match=TAG_ONE), "was to be there")
    assert_changed(await put(client, ONE, if_match="*"), "was to be there")
    assert (await put(client, ONE)).headers["etag"] == TAG_ONE
    assert_changed(await put(client, TWO, if_match=TAG_TWO), "another one was expected")
    assert (await put(client, TWO, if_match=TAG_ONE)).status_code == 200
    assert (await put(client, ONE, if_match=f"{TAG_ONE}, {TAG_TWO}")).status_code == 200
    assert (await put(client, TWO, if_match="*")).status_code == 200
    assert (await client.get(PATH)).json()["digest"] == digest(TWO)


async def test_delete_only_a_version(client: httpx.AsyncClient) -> None:
    await put(client, ONE)
    assert_changed(await client.delete(PATH, headers={"if-match": TAG_TWO}), digest(ONE))
    assert (await client.delete(PATH, headers={"if-match": TAG_ONE})).status_code == 200


async def test_the_folders_file_of_this_moment_counts(
    client: httpx.AsyncClient, folder: Path
) -> None:
    place(folder, "a", ONE)
    assert_changed(await put(client, TWO, if_none_match="*"), digest(ONE))
    assert (await put(client, TWO, if_match=TAG_ONE)).status_code == 200


@pytest.mark.parametrize(
    "between",
    [lambda registry: registry.put("a", file_bytes(3)), lambda registry: registry.remove("a")],
    ids=["another upload", "a removal"],
)
@pytest.mark.parametrize("change", ["put", "rollback"])
async def test_the_answer_is_of_the_change_that_was_asked_for(
    client: httpx.AsyncClient,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    between: Callable[[Registry], object],
) -> None:
    await put(client, TWO)
    await put(client, ONE)
    changed = getattr(registry, change)

    def and_then(*arguments: Any, **options: Any) -> Any:
        result = changed(*arguments, **options)
        monkeypatch.undo()
        between(registry)
        return result

    monkeypatch.setattr(registry, change, and_then)
    if change == "put":
        response = await put(client, TWO)
    else:
        response = await client.post(f"{PATH}/rollback")
    assert (response.status_code, response.headers["etag"]) == (200, TAG_TWO)
    assert response.json()["versions"] == [digest(TWO), digest(ONE)]


async def test_two_who_upload_get_their_own(client: httpx.AsyncClient) -> None:
    async def upload(data: bytes, tag: str) -> None:
        for _ in range(100):
            response = await put(client, data)
            assert response.status_code in (200, 201)
            assert response.headers["etag"] == f'"{response.json()["digest"]}"' == tag

    async def remove(uploads: list[asyncio.Task[None]]) -> None:
        while not all(task.done() for task in uploads):
            assert (await client.delete(PATH)).status_code in (200, 404)

    uploads = [asyncio.create_task(upload(ONE, TAG_ONE)), asyncio.create_task(upload(TWO, TAG_TWO))]
    await asyncio.gather(*uploads, remove(uploads))


@pytest.mark.parametrize(
    ("method", "headers", "param"),
    [
        ("PUT", {"if-match": digest(ONE)}, "if-match"),
        ("PUT", {"if-match": '"abc"'}, "if-match"),
        ("PUT", {"if-match": f"W/{TAG_ONE}"}, "if-match"),
        ("PUT", {"if-none-match": TAG_ONE}, "if-none-match"),
        ("PUT", {"if-none-match": "*", "if-match": TAG_ONE}, "if-none-match"),
        ("DELETE", {"if-none-match": "*"}, "if-none-match"),
        ("GET", {"if-none-match": digest(ONE)}, "if-none-match"),
    ],
)
async def test_conditions_that_are_none(
    client: httpx.AsyncClient, method: str, headers: dict[str, str], param: str
) -> None:
    response = await client.request(method, PATH, content=ONE, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_what_a_client_has_is_not_sent_again(client: httpx.AsyncClient) -> None:
    await put(client, ONE)
    for tags in (TAG_ONE, f"{TAG_TWO}, {TAG_ONE}", f"W/{TAG_ONE}", "*"):
        response = await client.get(PATH, headers={"if-none-match": tags})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == TAG_ONE
        assert "content-length" not in response.headers
    other = await client.get(PATH, headers={"if-none-match": TAG_TWO})
    # Pins and counts change without the version, by which a cache would ask.
    assert (other.status_code, other.headers["cache-control"]) == (200, "no-store")
    await put(client, TWO)
    response = await client.get(PATH, headers={"if-none-match": TAG_ONE})
    assert (response.status_code, response.headers["etag"]) == (200, TAG_TWO)
    absent = await client.get("/v1/interventions/b", headers={"if-none-match": "*"})
    assert absent.status_code == 404


async def test_every_task_is_counted(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    names = [f"task-{number}" for number in range(MAX_NAMES + 2)]
    for name in names:
        await client.put(f"/v1/interventions/{name}", content=ONE)

    async def ask(**fields: Any) -> None:
        await client.post("/v1/completions", json=completion(prompt="Hello", **fields))

    last = names[-1]
    await ask(model=last)
    await ask(model="tiny", n=2, interventions=[{"name": last}, {"name": last}])
    await ask(model="tiny")
    entries = {e["id"]: e for e in (await client.get("/v1/interventions")).json()["data"]}
    assert entries[last]["prompt_tokens"] == 10
    assert entries[last]["generation_tokens"] == 4 + 2 * 4
    assert entries[names[0]]["prompt_tokens"] == entries[names[0]]["generation_tokens"] == 0
    text = (await client.get("/metrics")).text
    assert 'reft:intervention_prompt_tokens_total{intervention="(other)"} 10.0' in text
    assert 'reft:intervention_prompt_tokens_total{intervention="(base)"} 5.0' in text
    assert f'intervention="{last}"' not in text
