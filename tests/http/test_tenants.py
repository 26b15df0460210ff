"""Who may do what: every tenant, every route of the application, every kind of name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import SecretStr

from reft_runtime.interventions import Registry
from server.errors import ApiError
from server.routes import page
from server.settings import Settings
from server.tenants.access import ACCESS
from server.tenants.keys import new_key
from server.tenants.tenant import Tenant
from server.tenants.view import View
from tests.http.conftest import chat, completion
from tests.http.fake_engine import FakeEngine
from tests.http.test_access import PUBLIC, api_routes
from tests.http.test_logs import Lines
from tests.http.test_logs import log as log  # a fixture
from tests.interventions.make import BASE, digest, file_bytes, place

ONE, TWO = file_bytes(1, description="The first"), file_bytes(2, description="The second")

THERE = ("shared", "shares", "team-a.mine", "team-b.theirs")
"""What is served. `shares` is hidden from most, and spelt like what they see."""

NAMES = (*THERE, "sharez", "team-a.new")
"""The names that are asked for."""

BROKEN = ("broken", "team-a.broken", "team-b.broken")
"""Files that are not served, which is told to admins."""

HIDDEN, UNKNOWN = "shares", "sharez"

EVERY = frozenset(NAMES)


@dataclass(frozen=True)
class Who:
    """One who asks, and what is specified for it; `told` is whether it is told of the server."""

    key: str | None
    table: str = ""
    sees: frozenset[str] = frozenset()
    changes: frozenset[str] = frozenset()
    admin: bool = False
    told: bool = False

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"authorization": f"Bearer {self.key}"}


def tenant(name: str, lines: str, **specified: Any) -> Who:
    key, hashed = new_key()
    return Who(key, f'[tenants.{name}]\nkeys = ["{hashed}"]\n{lines}\n', **specified)


OWN = frozenset({"team-a.mine", "team-a.new"})
WHO = {
    "no key": Who(None),
    "wrong key": Who("reft-wrong"),
    "another team": tenant(
        "team-b", 'interventions = ["team-b.*"]', sees=frozenset({"team-b.theirs"})
    ),
    "user": tenant("team-c", 'interventions = ["shared"]', sees=frozenset({"shared"})),
    "user with upload": tenant(
        "team-a", 'interventions = ["shared"]\nupload = true', sees=OWN | {"shared"}, changes=OWN
    ),
    "admin of some": tenant(
        "ops",
        'role = "admin"\ninterventions = ["shared", "team-a.*"]',
        sees=OWN | {"shared"},
        changes=OWN | {"shared"},
        admin=True,
    ),
    "admin": tenant("root", 'role = "admin"', sees=EVERY, changes=EVERY, admin=True, told=True),
    "owner": Who("sesame-42", "", EVERY, EVERY, admin=True, told=True),
}
KNOWN = [who for who in WHO if who not in ("no key", "wrong key")]


def generating(body: Callable[..., dict[str, Any]]) -> Callable[[str], Iterator[dict[str, Any]]]:
    """Bodies that name an intervention in each way that there is."""

    def bodies(name: str) -> Iterator[dict[str, Any]]:
        yield body(model=name)
        yield body(model=f"tiny:{name}")
        yield body(model=f"{name}@{digest(TWO)[:12]}")
        yield body(interventions=[{"name": name}])

    return bodies


BODIES: dict[str, Callable[[str], Iterator[dict[str, Any]]]] = {
    "POST /v1/chat/completions": generating(chat),
    "POST /v1/completions": generating(completion),
    "POST /v1/responses": generating(lambda **given: {"model": "tiny", "input": "Hi", **given}),
    "POST /v1/classify": generating(
        lambda **given: {"model": "tiny", "input": "Hi", "labels": ["a", "b"], **given}
    ),
    "POST /tokenize": lambda name: iter([{"model": name, "prompt": "Hi"}]),
    "POST /detokenize": lambda name: iter([{"model": name, "tokens": [72]}]),
    "POST /v1/load_lora_adapter": lambda name: iter(
        [{"lora_name": name, "lora_path": "shared.safetensors", "load_inplace": True}]
    ),
    "POST /v1/unload_lora_adapter": lambda name: iter([{"lora_name": name}]),
}
"""Bodies of the routes that name an intervention in them."""

ALWAYS_404 = {"GET /v1/responses/{response_id}", "DELETE /v1/responses/{response_id}"}
"""Routes that only say that nothing is stored."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("shared", HIDDEN):
        place(folder, name, ONE)
    for name in BROKEN:
        (folder / f"{name}.safetensors").write_bytes(b"no intervention")
    registry = Registry(BASE, [folder])
    restore(registry)
    yield registry
    registry.close()


def restore(registry: Registry) -> None:
    """Serve again what the tests ask for, each with a version before the current one."""
    for name in {entry.name for entry in registry.entries()} - set(THERE):
        registry.remove(name)
    for name in THERE:
        registry.put(name, ONE)
        registry.put(name, TWO)


@pytest.fixture
def engine(registry: Registry) -> FakeEngine:
    engine = FakeEngine()
    engine.registry = registry
    return engine


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text("\n".join(who.table for who in WHO.values()))
    return file


@pytest.fixture
def settings(keys_file: Path) -> Settings:
    return Settings(keys=keys_file, api_key=SecretStr("sesame-42"))


def guarded(app: FastAPI) -> list[str]:
    """All routes that need a key, as METHOD PATH."""
    routes = [route for route in api_routes(app.routes) if route not in page.routes]
    assert all(isinstance(route, APIRoute) for route in routes)
    found = [
        f"{method} {route.path}"
        for route in routes
        if isinstance(route, APIRoute) and route.path not in PUBLIC
        for method in route.methods or ()
    ]
    assert len(found) > 20
    return found


def requests(route: str, name: str) -> Iterator[dict[str, Any]]:
    """Every way to ask a route for a name; of a route that takes none, one way."""
    method, path = route.split()
    path = path.replace("{name}", name).replace("{response_id}", "resp_1")
    if "{model:path}" in path:
        for model in (name, f"tiny:{name}", f"{name}@{digest(TWO)[:12]}"):
            yield {"method": method, "url": path.replace("{model:path}", model)}
    elif route in BODIES:
        for body in BODIES[route](name):
            yield {"method": method, "url": path, "json": body}
    elif method == "PUT":
        yield {"method": method, "url": path, "content": TWO}
    else:
        assert "{" not in path, f"say in this test how {route} is asked for a name"
        yield {"method": method, "url": path}


def specified(who: Who, route: str, name: str) -> int:
    """The status that this one gets from the route for the name; 200 for every success."""
    access = ACCESS[route]
    names = "{name}" in route or "{model" in route or route in BODIES
    if who in (WHO["no key"], WHO["wrong key"]):
        return 401
    if (access == "server" and not who.told) or (access == "admin" and not who.admin):
        return 403
    if route in ALWAYS_404:
        return 404
    if not names:
        return 200
    if route.startswith("PUT") or "/load_lora" in route:
        return 200 if name in who.changes else 403
    if name not in who.sees:
        return 404
    if access == "change" and name not in who.changes:
        return 403
    return 200 if name in THERE else 404


def test_every_route_says_who_may_use_it(app: FastAPI) -> None:
    assert sorted(guarded(app)) == sorted(ACCESS)


@pytest.mark.parametrize("who", WHO)
async def test_every_route_and_name(
    who: str, client: httpx.AsyncClient, app: FastAPI, registry: Registry
) -> None:
    asking = WHO[who]
    for route in guarded(app):
        for name in NAMES:
            for request in requests(route, name):
                answer = await client.request(**request, headers=asking.headers)
                status = 200 if answer.is_success else answer.status_code
                assert status == specified(asking, route, name), (request, answer.text)
                if status == 403:
                    error = answer.json()["error"]
                    assert (error["type"], error["code"]) == ("permission_error", "forbidden")
                if answer.is_success and ACCESS[route] != "use":
                    restore(registry)


CONDITIONS: tuple[dict[str, str], ...] = ({}, {"if-match": f'"{digest(TWO)}"'}, {"if-match": "*"})


@pytest.mark.parametrize("who", [who for who in KNOWN if HIDDEN not in WHO[who].sees])
async def test_what_is_hidden_is_told_as_what_is_unknown(
    who: str, client: httpx.AsyncClient, app: FastAPI
) -> None:
    seen = "`shared`" if "shared" in WHO[who].sees else ""
    asked = 0
    for route in guarded(app):
        for hidden, unknown in zip(requests(route, HIDDEN), requests(route, UNKNOWN), strict=True):
            if hidden == unknown:
                continue
            for condition in CONDITIONS if "{name}" in route else CONDITIONS[:1]:
                headers = WHO[who].headers | condition
                answers = [
                    await client.request(**request, headers=headers)
                    for request in (hidden, unknown)
                ]
                first, second = (told(answer) for answer in answers)
                assert first == second
                assert answers[0].status_code in (403, 404, 412)
                for other in set(THERE) - WHO[who].sees - {HIDDEN}:
                    assert other not in answers[0].text
                if answers[0].status_code != 403:
                    owner = WHO["owner"].headers | condition
                    really = await client.request(**unknown, headers=owner)
                    assert really.status_code == answers[0].status_code
                    assert unasked(really) == unasked(answers[1])
                if answers[0].status_code == 404 and "@" not in str(hidden):
                    assert seen in answers[0].json()["error"]["message"]
                asked += 1
    assert asked > 20


def unasked(answer: httpx.Response) -> dict[str, Any]:
    """An answer's error without the question which name was meant."""
    error: dict[str, Any] = answer.json()["error"]
    return error | {"message": error["message"].partition(" Did you mean")[0]}


async def test_no_error_asks_whether_something_hidden_was_meant(
    client: httpx.AsyncClient, app: FastAPI, registry: Registry
) -> None:
    registry.put("team-b.near", ONE)
    headers = WHO["user with upload"].headers
    told = []
    for route in guarded(app):
        if "name}" in route or "model:" in route or route in BODIES:
            for request in requests(route, "team-a.near"):
                answer = await client.request(**request, headers=headers)
                assert "team-b" not in answer.text
                told.append(answer.status_code)
                if answer.is_success:
                    registry.remove("team-a.near")
    assert told.count(404) > 15


def told(answer: httpx.Response) -> tuple[int, str, dict[str, str]]:
    """What an answer says, but for the name that was asked for."""
    text = answer.text.replace(HIDDEN, "NAME").replace(UNKNOWN, "NAME")
    headers = {key: value for key, value in answer.headers.items() if key != "x-request-id"}
    return answer.status_code, text, headers


@pytest.mark.parametrize("who", KNOWN)
async def test_listings_have_what_is_seen(who: str, client: httpx.AsyncClient) -> None:
    asking = WHO[who]
    seen = sorted(asking.sees & set(THERE))
    whole = (await client.get("/v1/interventions", headers=asking.headers)).json()
    assert [entry["id"] for entry in whole["data"]] == seen
    told = [name for name in BROKEN if asking.told or (asking.admin and name == "team-a.broken")]
    assert whole["problems"].keys() == {f"{name}.safetensors" for name in told}
    models = (await client.get("/v1/models", headers=asking.headers)).json()["data"]
    assert [model["id"] for model in models] == ["tiny", *seen]
    for sort in ("name", "-requests"):
        found: list[str] = []
        after = None
        while True:
            query = {"limit": 1, "sort": sort, **({"after": after} if after else {})}
            answer = await client.get("/v1/interventions", params=query, headers=asking.headers)
            body = answer.json()
            assert body["total"] == len(seen)
            found += [entry["id"] for entry in body["data"]]
            after = body["next"]
            if after is None:
                break
            assert not any(name in after for name in set(THERE) - asking.sees)
        assert sorted(found) == seen
    query = {"q": "the second"}
    answer = await client.get("/v1/interventions", params=query, headers=asking.headers)
    assert answer.json()["total"] == len(seen)


def test_the_view_itself_refuses_what_is_seen_and_may_not_be_changed() -> None:
    user = Tenant("team-a", patterns=("pirate", "team-b.*"), upload=True)
    engine = FakeEngine()
    view = View(engine.registry, user, "an-id")
    for name in ("pirate", "team-b.new"):
        for change in (
            partial(view.put, name, view.incoming(), None, None),
            partial(view.load, name, "pirate.safetensors", replace=True),
        ):
            with pytest.raises(ApiError, match="may change names that begin"):
                change()
    unpermitted: list[Callable[[], object]] = [
        partial(view.remove, "pirate"),
        partial(view.rollback, "pirate", None, None),
        partial(view.pin, "pirate"),
        partial(view.unpin, "pirate"),
        partial(view.warm, "pirate"),
    ]
    for refused in unpermitted:
        with pytest.raises(ApiError, match="may change names that begin"):
            refused()
    assert sorted(engine.own.versions) == ["emoji", "formal", "pirate"]


@pytest.mark.parametrize("path", ["shares.safetensors", "./shares.safetensors/.", "x/../shares"])
async def test_an_admin_of_some_loads_no_file_of_others(
    client: httpx.AsyncClient, path: str
) -> None:
    body = {"lora_name": "team-a.new", "lora_path": path}
    headers = WHO["admin of some"].headers
    hidden = await client.post("/v1/load_lora_adapter", json=body, headers=headers)
    body["lora_path"] = "team-a.absent.safetensors"
    absent = await client.post("/v1/load_lora_adapter", json=body, headers=headers)
    assert hidden.status_code == 404
    assert hidden.json() == absent.json()


async def test_a_route_that_is_not_in_the_table_is_for_admins_of_all(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ACCESS, "GET /version")
    for who in KNOWN:
        answer = await client.get("/version", headers=WHO[who].headers)
        assert answer.status_code == (200 if WHO[who].told else 403)


async def test_a_refused_upload_is_not_read(client: httpx.AsyncClient) -> None:
    async def body() -> Any:
        pytest.fail("the body was read")
        yield b""

    for who, name in (("user", "mine"), ("user with upload", "team-b.x")):
        path = f"/v1/interventions/{name}"
        answer = await client.put(path, content=body(), headers=WHO[who].headers)
        assert answer.status_code == 403
        error = answer.json()["error"]["message"]
        assert ("`upload = true` in its part of the keys file" in error) is (who == "user")
    assert "begin with `team-a.`" in error


@pytest.mark.parametrize("body", [completion(), chat()])
async def test_tenants_share_no_prefixes(
    client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any]
) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    salts = []
    for who in ("user", "user", "user with upload", "owner"):
        assert (await client.post(path, json=body, headers=WHO[who].headers)).is_success
        salts.append(engine.streams[-1].salt)
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3
    assert b"" not in salts


class TestShared:
    @pytest.fixture
    def settings(self, keys_file: Path) -> Settings:
        return Settings(keys=keys_file, shared_prefix_cache=True)

    async def test_tenants_share_prefixes_if_that_is_said(
        self, client: httpx.AsyncClient, engine: FakeEngine
    ) -> None:
        for who in ("user", "user with upload"):
            headers = WHO[who].headers
            assert await client.post("/v1/completions", json=completion(), headers=headers)
            assert engine.streams[-1].salt == b""


async def test_changes_are_audited(client: httpx.AsyncClient, log: Lines) -> None:
    first, second = digest(ONE), digest(TWO)
    uploader, path = WHO["user with upload"].headers, "/v1/interventions/team-a.mine"
    ids = {"x-request-id": "mine"}
    await client.put(path, content=ONE, headers=uploader | ids)
    await client.post(f"{path}/rollback", headers=uploader)
    await client.delete(path, headers=uploader)
    admin = WHO["owner"].headers
    body = {"lora_name": "new", "lora_path": "shared.safetensors"}
    await client.post("/v1/load_lora_adapter", json=body, headers=admin)
    await client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}, headers=admin)
    lines = [line for line in log.json if line["logger"] == "reft.audit"]
    assert [
        (line["tenant"], line["action"], line["name"], line["before"], line["after"])
        for line in lines
    ] == [
        ("team-a", "put", "team-a.mine", second, first),
        ("team-a", "rollback", "team-a.mine", first, second),
        ("team-a", "delete", "team-a.mine", second, None),
        ("(owner)", "load", "new", None, first),
        ("(owner)", "delete", "new", first, None),
    ]
    assert lines[0]["id"] == "mine"
    assert lines[0]["time"]
    [text] = [line for line in log.text if "id=mine" in line and "team-a.mine" in line][:1]
    assert f"audit: put team-a.mine {second[:12]} -> {first[:12]} tenant=team-a id=mine" in text


async def test_the_log_says_whose_request_it_was(client: httpx.AsyncClient, log: Lines) -> None:
    for who in ("user", "owner", "wrong key"):
        await client.post("/v1/completions", json=completion(), headers=WHO[who].headers)
    assert [line.get("tenant") for line in log.json] == ["team-c", None, None]
    assert "tenant=team-c task=tiny" in log.text[0]


async def test_refused_changes_are_audited(client: httpx.AsyncClient, log: Lines) -> None:
    user, uploader = WHO["user"].headers, WHO["user with upload"].headers
    await client.put("/v1/interventions/shared", content=ONE, headers=user)
    await client.delete("/v1/interventions/shared", headers=user)
    await client.delete("/v1/interventions/shares", headers=user)
    await client.put("/v1/interventions/team-a.mine", content=b"x", headers=uploader)
    for action in ("load", "unload"):
        await client.post(f"/v1/{action}_lora_adapter", json={}, headers=user)
    await client.get("/metrics", headers=user)
    lines = [line for line in log.json if line["logger"] == "reft.audit"]
    assert [(line["action"], line["name"], line["refused"]) for line in lines] == [
        ("put", "shared", 403),
        ("delete", "shared", 403),
        ("delete", "shares", 404),
        ("put", "team-a.mine", 400),
        ("load", "", 403),  # the name is in the body, which was not read
        ("delete", "", 403),
    ]
    assert any("audit: load - refused=403 tenant=team-c" in line for line in log.text)


LIMITED, LIMITED_HASH = new_key()


class TestLimits:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        file = tmp_path / "limits.toml"
        file.write_text(
            f'[tenants.small]\nkeys = ["{LIMITED_HASH}"]\ninterventions = []\n'
            "[tenants.small.limits]\nmax_tokens = 8\nn = 2\n"
        )
        return Settings(keys=file)

    @pytest.mark.parametrize(
        ("path", "given", "tokens"),
        [
            ("/v1/completions", completion(max_tokens=None), 8),  # its own default is 16
            ("/v1/completions", completion(max_tokens=3), 3),
            ("/v1/chat/completions", chat(max_tokens=None), 8),
            ("/v1/chat/completions", chat(max_tokens=None, max_completion_tokens=8), 8),
            ("/v1/responses", {"model": "tiny", "input": "Hi"}, 8),
        ],
    )
    async def test_within(
        self,
        client: httpx.AsyncClient,
        engine: FakeEngine,
        path: str,
        given: dict[str, Any],
        tokens: int,
    ) -> None:
        headers = {"authorization": f"Bearer {LIMITED}"}
        assert (await client.post(path, json=given, headers=headers)).is_success
        assert engine.streams[-1].sampling.max_tokens == tokens

    async def test_a_long_prompt_still_fits(
        self, client: httpx.AsyncClient, engine: FakeEngine
    ) -> None:
        body = chat(max_tokens=None, messages=[{"role": "user", "content": "x" * 90}])
        headers = {"authorization": f"Bearer {LIMITED}"}
        assert (await client.post("/v1/chat/completions", json=body, headers=headers)).is_success
        assert engine.streams[-1].sampling.max_tokens == 100 - 96

    @pytest.mark.parametrize(
        ("path", "given", "param"),
        [
            ("/v1/completions", completion(max_tokens=9), "max_tokens"),
            ("/v1/chat/completions", chat(max_tokens=9), "max_tokens"),
            ("/v1/chat/completions", chat(n=3), "n"),
            (
                "/v1/responses",
                {"model": "tiny", "input": "Hi", "max_output_tokens": 9},
                "max_output_tokens",
            ),
        ],
    )
    async def test_beyond(
        self, client: httpx.AsyncClient, path: str, given: dict[str, Any], param: str
    ) -> None:
        headers = {"authorization": f"Bearer {LIMITED}"}
        answer = await client.post(path, json=given, headers=headers)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == param
        assert f"{param}: your key allows {2 if param == 'n' else 8}" in error["message"]


async def test_nothing_without_a_key_tells_of_names_or_tenants(
    client: httpx.AsyncClient, settings: Settings
) -> None:
    for path in sorted(PUBLIC):
        text = (await client.get(path)).text
        assert json.loads(text) == {"status": "ok"}
