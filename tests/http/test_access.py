"""Keys, error shapes, request ids, the API's description."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import SecretStr
from starlette.routing import BaseRoute

from reft_runtime.errors import ConfigError
from server import openapi
from server.routes import page
from server.schemas.chat import ChatRequest, Message
from server.schemas.completions import CompletionRequest
from server.schemas.interventions import LoadRequest
from server.schemas.text import TokenizeRequest
from server.settings import Settings, load_settings
from tests.http.conftest import completion
from tests.http.fake_engine import FakeEngine

KEY = "sesame-42"
PUBLIC = {"/livez", "/readyz", "/health"}


def api_routes(routes: list[BaseRoute]) -> Iterator[BaseRoute]:
    """All routes, those of included routers too."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is None:
            yield route
        else:
            yield from api_routes(inner.routes)


class TestWithKey:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(api_key=SecretStr(KEY))

    async def test_every_route_but_health_needs_the_key(
        self, client: httpx.AsyncClient, app: FastAPI
    ) -> None:
        seen = set()
        for route in api_routes(app.routes):
            if route in page.routes:  # its files hold no data: tests/http/test_page.py
                continue
            assert isinstance(route, APIRoute)
            for method in route.methods or ():
                path = route.path.replace("{name}", "emoji").replace("{model:path}", "tiny")
                response = await client.request(method, path)
                seen.add(path)
                if path in PUBLIC:
                    assert response.status_code == 200
                else:
                    assert response.status_code == 401, f"{method} {path}"
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert response.json()["error"]["code"] == "invalid_api_key"
        assert len(seen) >= 15

    @pytest.mark.parametrize(
        "value",
        [KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "é"],
    )
    async def test_wrong_key(self, client: httpx.AsyncClient, value: str) -> None:
        headers = {b"authorization": value.encode()}
        assert (await client.get("/v1/models", headers=headers)).status_code == 401

    @pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", f"Bearer  {KEY} "])
    async def test_right_key(self, client: httpx.AsyncClient, value: str) -> None:
        headers = {"authorization": value}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200

    async def test_the_prefix_cache_is_salted(
        self, client: httpx.AsyncClient, engine: FakeEngine
    ) -> None:
        headers = {"authorization": f"Bearer {KEY}"}
        for stream in (False, True):
            await client.post("/v1/completions", json=completion(stream=stream), headers=headers)
        salts = [stream.salt for stream in engine.streams[-2:]]
        assert len(salts[0]) == 32
        assert salts[0] == salts[1]

    async def test_a_crafted_host_opens_nothing(self, client: httpx.AsyncClient) -> None:
        for host in ("test/livez?", "test/health#", "/livez"):
            response = await client.get("/v1/models", headers={"host": host})
            assert response.status_code == 401

    async def test_the_body_is_not_read_before_the_key(self, client: httpx.AsyncClient) -> None:
        async def body() -> Any:
            pytest.fail("the body was read")
            yield b""

        headers = {"content-type": "application/json"}
        response = await client.post("/v1/completions", content=body(), headers=headers)
        assert response.status_code == 401

    async def test_the_key_never_shows(
        self, client: httpx.AsyncClient, settings: Settings, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "reft.server")
        await client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        await client.post("/v1/completions", headers={"authorization": f"Bearer {KEY}"})
        assert KEY not in caplog.text
        assert KEY not in repr(settings)


async def test_without_keys_all_share_the_prefix_cache(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    await client.post("/v1/completions", json=completion())
    assert engine.streams[-1].salt == b""


async def test_head_is_answered_as_get_is(server_url: str) -> None:
    async with httpx.AsyncClient(base_url=server_url) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
        asked = [path.replace("{name}", "a") for path, told in paths.items() if "get" in told]
        assert {"/livez", "/readyz", "/health", "/metrics", "/v1/models"} <= set(asked)
        for path in [*asked, "/", "/openapi.json", "/v1/nothing", "/v1/completions"]:
            head, get = await client.head(path), await client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b""), path
            for name in ("content-type", "allow"):
                assert head.headers.get(name) == get.headers.get(name), path
        health = await client.head("/livez")
        assert (
            health.headers["content-length"]
            == (await client.get("/livez")).headers["content-length"]
        )


async def test_unknown_route_and_method(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/nothing")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == (
        "There is no route /v1/nothing; /openapi.json lists them."
    )
    for path in ("/v1/completions/", "/docs/", "/v1/interventions/x/file/"):
        # No redirection, which would lead around a proxy in front.
        response = await client.get(path)
        assert response.status_code == 404
        assert response.json()["error"]["message"] == (
            f"There is no route {path}; leave out the slash at its end."
        )
    for path, methods in (
        ("/v1/completions", "POST"),
        ("/v1/interventions/x", "DELETE, GET, HEAD, PUT"),
        ("/health", "GET, HEAD"),
    ):
        response = await client.patch(path)
        assert response.status_code == 405
        assert response.headers["allow"] == methods
        assert methods in response.json()["error"]["message"]
    for path, instead in (
        ("/v1/messages", "use /v1/chat/completions"),
        ("/v1/embeddings", "use another"),
        ("/v1/responses/input_tokens", "/tokenize counts"),
        ("/v1/responses/compact", "shorten the conversation"),
    ):
        response = await client.post(path, json={})
        assert response.status_code == 404
        message = response.json()["error"]["message"]
        assert message.startswith(f"There is no route {path}; ")
        assert instead in message


class TestOrigins:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(api_key=SecretStr(KEY), allowed_origins="https://a.example,https://b")

    async def test_a_browser_may_ask_from_these(self, client: httpx.AsyncClient) -> None:
        headers = {
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        response = await client.options("/v1/chat/completions", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        assert "POST" in response.headers["access-control-allow-methods"]
        assert "authorization" in response.headers["access-control-allow-headers"]

    @pytest.mark.parametrize("broken", [False, True])
    async def test_it_may_read_errors_too(
        self,
        client: httpx.AsyncClient,
        engine: FakeEngine,
        monkeypatch: pytest.MonkeyPatch,
        broken: bool,
    ) -> None:
        headers = {"origin": "https://b"}
        if broken:
            monkeypatch.setattr(engine, "registry", None)
            headers["authorization"] = f"Bearer {KEY}"
        response = await client.get("/v1/models", headers=headers)
        assert response.status_code == (500 if broken else 401)
        assert response.headers["access-control-allow-origin"] == "https://b"
        assert "x-request-id" in response.headers["access-control-expose-headers"]

    async def test_others_may_not(self, client: httpx.AsyncClient) -> None:
        headers = {"origin": "https://c.example", "access-control-request-method": "POST"}
        response = await client.options("/v1/chat/completions", headers=headers)
        assert response.status_code == 400
        assert "access-control-allow-origin" not in response.headers


async def test_no_origin_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    response = await client.options("/v1/completions", headers=headers)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("value", ["a.example", "https://a/b", "[1]", '["https://a"', "*,,", "[]x"])
def test_origins_that_are_none(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--allowed-origins .*: write '\*', or origins"):
        load_settings({"allowed_origins": value})


@pytest.mark.parametrize(
    ("value", "origins"),
    [
        (None, []),
        ("*", ["*"]),
        ('["*"]', ["*"]),
        ('["http://a:1", "https://b"]', ["http://a:1", "https://b"]),
        ("http://a:1, https://b", ["http://a:1", "https://b"]),
    ],
)
def test_origins(value: str | None, origins: list[str]) -> None:
    assert load_settings({"allowed_origins": value}).origins == origins


async def test_full_queue(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.overloaded = True
    for stream in (False, True):
        response = await client.post("/v1/completions", json=completion(stream=stream))
        assert response.status_code == 503
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["code"] == "overloaded"


async def test_an_early_fault_says_nothing_of_the_inside(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_after = 0
    for stream in (False, True):
        response = await client.post("/v1/completions", json=completion(stream=stream))
        assert response.status_code == 500
        error = response.json()["error"]
        assert response.headers["x-request-id"] in error["message"]
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert "secret" not in response.text
    assert "secret" in caplog.text


async def test_an_unforeseen_exception(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "registry", None)
    response = await client.get("/v1/models", headers={"x-request-id": "abc"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "abc"
    assert "abc" in response.json()["error"]["message"]


async def test_request_id(client: httpx.AsyncClient) -> None:
    for given, kept in (("abc-1.2_3", True), ("a" * 129, False), ("a b", False), ("a\tb", False)):
        response = await client.get("/livez", headers={"x-request-id": given})
        assert (response.headers["x-request-id"] == given) is kept
        assert response.headers["x-request-id"]


async def test_description(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    reference = body["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/CompletionRequest"
    for reference in references(document):
        _, _, kind, name = reference.split("/")
        assert name in document["components"][kind]


def test_the_description_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that made it at once failed in Python's parser."""
    made, again = [0], threading.Event()

    def describe(_: FastAPI) -> dict[str, Any]:
        made[0] += 1
        if made[0] > 1:
            again.set()
        again.wait(0.2)
        return {"paths": {}}

    monkeypatch.setattr(openapi, "describe", describe)
    app = FastAPI()
    with ThreadPoolExecutor(2) as threads:
        told = list(threads.map(openapi.described, [app, app]))
    assert (made, told[0] is told[1]) == ([1], True)


async def test_the_description_has_the_errors_and_nulls(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path, method, statuses in (
        ("/v1/completions", "post", {200, 400, 401, 404, 408, 413, 415, 431, 500, 503}),
        ("/v1/interventions/{name}", "put", {200, 201, 400, 401, 404, 409, 413, 500, 503, 507}),
        ("/v1/interventions/{name}", "get", {200, 400, 401, 404, 500, 503}),
        ("/v1/load_lora_adapter", "post", {200, 400, 401, 404, 409, 413, 415, 500, 503}),
        ("/v1/interventions/{name}/file", "get", {200, 400, 401, 404, 500, 503}),
        ("/v1/interventions/{name}/rollback", "post", {200, 400, 401, 404, 412, 415, 503, 507}),
        ("/v1/models", "get", {200, 401, 500, 503}),
        ("/readyz", "get", {200, 503}),
    ):
        declared = document["paths"][path][method]["responses"]
        assert {str(status) for status in statuses} <= declared.keys()
        assert "422" not in declared
    schemas = document["components"]["schemas"]
    for model in (CompletionRequest, ChatRequest, Message, TokenizeRequest, LoadRequest):
        schema = schemas[model.__name__]
        assert schema["additionalProperties"] == {"type": "null"}
        for name, field in schema["properties"].items():
            nullable = {"type": "null"} in field.get("anyOf", ())
            assert nullable is (name not in schema.get("required", ())), name


def references(node: Any) -> Iterator[str]:
    """All `$ref`s of a document."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for child in node.values():
            yield from references(child)
    elif isinstance(node, list):
        for child in node:
            yield from references(child)
