"""Changes on one server of a cluster: which others have them when they are answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from reft_runtime.errors import NotFound, Unavailable
from reft_runtime.interventions import Registry
from server.app import create_app
from server.settings import Settings
from tests.helpers.replicas import OnlyBehind
from tests.http.fake_engine import FakeEngine
from tests.interventions.make import BASE, digest, file_bytes, place

ONE, TWO = file_bytes(1), file_bytes(2)


class FakeReplicas(OnlyBehind):
    """Registries by their names; those of `away` take nothing in."""

    def __init__(self, **registries: Registry) -> None:
        super().__init__()
        self.registries = registries
        self.away: set[str] = set()

    async def catch_up(self, name: str) -> Sequence[str]:
        return [one for one in self.registries if not await asyncio.to_thread(self._has, one, name)]

    def _has(self, one: str, name: str) -> bool:
        try:
            self.registries[one].catch_up(name)
        except Unavailable:
            return False
        return one not in self.away


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    place(path, "of-a-source", ONE)
    return path


@pytest.fixture
def replicas(folder: Path, tmp_path: Path) -> Iterator[FakeReplicas]:
    state = tmp_path / "state"
    registries = {
        name: Registry(BASE, [folder], state_dir=state, shared_state=True)
        for name in ("first", "second", "third")
    }
    yield FakeReplicas(**registries)
    for registry in registries.values():
        registry.close()


@pytest.fixture
def engine(replicas: FakeReplicas) -> FakeEngine:
    engine = FakeEngine()
    engine.registry = replicas.registries["first"]
    return engine


@pytest.fixture
def app(engine: FakeEngine, settings: Settings, replicas: FakeReplicas) -> FastAPI:
    return create_app(engine, settings, replicas)


CHANGES: list[tuple[str, str, object, str | None, bool]] = [
    ("PUT", "/v1/interventions/a", ONE, digest(ONE), False),
    ("PUT", "/v1/interventions/a", TWO, digest(TWO), False),
    ("POST", "/v1/interventions/a/rollback", {}, digest(ONE), False),
    ("POST", "/v1/interventions/a/pin", {}, digest(ONE), True),
    ("POST", "/v1/interventions/a/unpin", {}, digest(ONE), False),
    ("DELETE", "/v1/interventions/a", {}, None, False),
    ("PUT", "/v1/interventions/a", TWO, digest(TWO), False),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}, None, False),
]
"""Changes of a name: what is sent, the version that it stands for then, whether it is pinned."""


async def send(client: httpx.AsyncClient, method: str, path: str, body: object) -> httpx.Response:
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return await client.request(method, path, **content)


async def test_a_change_that_is_answered_is_on_every_replica(
    client: httpx.AsyncClient, replicas: FakeReplicas
) -> None:
    for method, path, body, version, pinned in CHANGES:
        answer = await send(client, method, path, body)
        assert answer.is_success, answer.text
        assert "x-replicas-behind" not in answer.headers
        assert "replicas_behind" not in answer.text
        for registry in replicas.registries.values():
            if version is None:
                with pytest.raises(NotFound):
                    registry.resolve("a")
            else:
                assert registry.resolve("a").digest == version
                assert registry.entry("a").pinned is pinned


async def test_replicas_that_did_not_see_a_change_are_named(
    client: httpx.AsyncClient, replicas: FakeReplicas
) -> None:
    replicas.away = {"second", "third"}
    for method, path, body, _, _ in CHANGES:
        answer = await send(client, method, path, body)
        assert answer.is_success, answer.text
        assert answer.headers["x-replicas-behind"] == "second, third"
        if "lora" not in path:  # whose answers are plain text
            assert answer.json()["replicas_behind"] == ["second", "third"]
    refused = await client.post("/v1/interventions/a/pin")
    assert refused.status_code == 404
    assert "x-replicas-behind" not in refused.headers


async def test_what_only_one_server_would_know_of_is_refused(
    client: httpx.AsyncClient, replicas: FakeReplicas, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "reft.audit")
    body = {"lora_name": "a", "lora_path": "of-a-source.safetensors"}
    load = await client.post("/v1/load_lora_adapter", json=body)
    assert (load.status_code, load.json()["error"]["param"]) == (400, "lora_path")
    assert "PUT /v1/interventions/NAME" in load.json()["error"]["message"]
    remove = await client.delete("/v1/interventions/of-a-source")
    assert (remove.status_code, remove.json()["error"]["param"]) == (400, "name")
    assert "remove the file there" in remove.json()["error"]["message"]
    assert caplog.text.count("refused=400") == 2
    # An upload that hides the file can be removed, and a file be pinned.
    replicas.registries["second"].put("of-a-source", TWO)
    assert (await client.delete("/v1/interventions/of-a-source")).status_code == 200
    assert (await client.post("/v1/interventions/of-a-source/pin")).status_code == 200
    for registry in replicas.registries.values():
        assert registry.resolve("of-a-source").digest == digest(ONE)
        assert registry.entry("of-a-source").pinned


async def test_without_a_shared_state_nothing_is_changed(
    client: httpx.AsyncClient, engine: FakeEngine, folder: Path
) -> None:
    engine.registry = Registry(BASE, [folder])
    for method, path, body in (
        ("PUT", "/v1/interventions/a", ONE),
        ("POST", "/v1/interventions/of-a-source/pin", {}),
        ("DELETE", "/v1/interventions/of-a-source", {}),
    ):
        answer = await send(client, method, path, body)
        assert answer.status_code == 400
        assert "--shared-state" in answer.json()["error"]["message"]
    assert [entry.name for entry in engine.registry.entries()] == ["of-a-source"]
    engine.registry.close()


def test_each_server_keeps_its_own_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path / "cache"))
    state = tmp_path / "state"
    alone = Settings(state_dir=str(state))
    assert alone.state_folder == state
    shared = Settings(state_dir=str(state), shared_state=True)
    assert tmp_path / "cache" in shared.state_folder.parents  # type: ignore[union-attr]
